"""Flash attention over intervals: no scores are kept for the backward pass.

The backward pass gets the output and the logsumexp of each query, and recomputes the scores. It
runs in XLA (`blockwise.py`), or on TPUs in Pallas kernels that walk a block list.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from neo_jax.kernels import block_list, blockwise, pallas_backward, pallas_forward
from neo_jax.kernels.softmax_base import LOG2_E

BLOCKS = (512, 512)  # queries, keys
LANES = 128  # the kernels take widths that are multiples of this


class BlockLists(NamedTuple):
    """The block lists of the Pallas kernels; kv-major only for a backward pass of two kernels."""

    q_major: tuple[jax.Array, jax.Array]
    kv_major: tuple[jax.Array, jax.Array] | None


def local_block_lists(
    start_bt, end_bt, num_keys: int, widths: tuple[int, int], itemsize: int
) -> BlockLists:
    """The block lists of one device; arguments as of `interval_attention.make_block_lists`."""
    blocks = blocks_for(start_bt.shape[1], num_keys)
    bounds = _pad(start_bt, blocks[0]), _pad(end_bt, blocks[0])
    size = num_keys + -num_keys % blocks[1]
    is_two_kernels = needs_kv_major(num_keys, widths, itemsize)
    return BlockLists(
        block_list.q_major(*bounds, size, *blocks),
        block_list.kv_major(*bounds, size, *blocks) if is_two_kernels else None,
    )


def needs_kv_major(num_keys: int, widths: tuple[int, int], itemsize: int) -> bool:
    """Whether the backward pass is two kernels, because the fused one does not fit VMEM."""
    num_bytes = pallas_backward.fused_vmem_bytes(num_keys, *widths, itemsize)
    return num_bytes > pallas_backward.FUSED_VMEM_LIMIT


def blocks_for(num_queries: int, num_keys: int) -> tuple[int, int]:
    """Queries and keys of a block: BLOCKS, or less for short sequences."""
    return tuple(
        min(block, length + -length % LANES)
        for block, length in zip(BLOCKS, (num_queries, num_keys), strict=True)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def flash(q_btnj, k_bskj, v_bskh, start_bt, end_bt, block_lists, scale, implementation):
    """`interval_attention` on one device.

    Args:
      block_lists: None for "blockwise".
      implementation: "blockwise", "pallas", "interpreted" (Pallas without a TPU), or "auto":
        Pallas where this is compiled for a TPU.
    """
    return _forward(q_btnj, k_bskj, v_bskh, start_bt, end_bt, block_lists, scale, implementation)[0]


def _forward(q_btnj, k_bskj, v_bskh, start_bt, end_bt, block_lists, scale, implementation):
    arrays = (q_btnj, k_bskj, v_bskh, start_bt, end_bt)
    run = _choose(implementation, _pallas, _blockwise)
    z_btnh, log_sum = run(*arrays, block_lists, scale=scale)
    # Saved with heads as lanes, as the kernels take it: with a dimension of heads, XLA would
    # change its layout twice.
    z_btnh = checkpoint_name(_flatten_heads(z_btnh), "attn_out").reshape(z_btnh.shape)
    log_sum = checkpoint_name(log_sum, "log_sum")
    return z_btnh, (*arrays, block_lists, z_btnh, log_sum)


def _backward(scale, implementation, residuals, dz_btnh):
    run = _choose(implementation, _pallas_backward, _blockwise_backward)
    return *run(*residuals, dz_btnh, scale=scale), None, None, None


flash.defvjp(_forward, _backward)


def _choose(implementation: str, pallas, xla):
    if implementation == "blockwise":
        return xla
    if implementation != "auto":
        return functools.partial(pallas, is_interpreted=implementation == "interpreted")

    def run(*arrays, **options):
        return jax.lax.platform_dependent(
            *arrays,
            tpu=functools.partial(pallas, **options),
            default=functools.partial(xla, **options),
        )

    return run


def _blockwise(q_btnj, k_bskj, v_bskh, start_bt, end_bt, block_lists, scale):
    z_btnh, log_sum = blockwise.forward(q_btnj, k_bskj, v_bskh, start_bt, end_bt, scale)
    return z_btnh, _group_by_key_head(log_sum, k_bskj.shape[2])


def _blockwise_backward(*residuals_and_dz, scale):
    *arrays, _, z_btnh, log_sum, dz_btnh = residuals_and_dz
    log_sum = jnp.moveaxis(log_sum, 3, 1).reshape(z_btnh.shape[:3])
    return blockwise.backward(*arrays, z_btnh, log_sum, dz_btnh, scale)


def _pallas(q_btnj, k_bskj, v_bskh, start_bt, end_bt, block_lists, scale, is_interpreted=False):
    (b, t, n), (s, k) = q_btnj.shape[:3], k_bskj.shape[1:3]
    blocks = blocks_for(t, s)
    arrays = _kernel_inputs(q_btnj, k_bskj, v_bskh, start_bt, end_bt, blocks, scale)
    z_bti, log_sum = pallas_forward.forward(
        *arrays, block_lists.q_major, (n, k), blocks, is_interpreted
    )
    return z_bti[:, :t].reshape(b, t, n, -1), log_sum[..., :t]


def _pallas_backward(*residuals_and_dz, scale, is_interpreted=False):
    *arrays, block_lists, z_btnh, log_sum, dz_btnh = residuals_and_dz
    (t, n), (s, k) = arrays[0].shape[1:3], arrays[1].shape[1:3]
    blocks = blocks_for(t, s)
    z_bti, dz_bti = (_pad(_flatten_heads(array), blocks[0]) for array in (z_btnh, dz_btnh))
    log_sum = jnp.pad(log_sum, [(0, 0)] * 3 + [(0, -t % blocks[0])])
    gradients = pallas_backward.backward(
        *_kernel_inputs(*arrays, blocks, scale),
        z_bti,
        log_sum,
        dz_bti,
        block_lists,
        scale,
        (n, k),
        blocks,
        is_interpreted,
    )
    return tuple(
        new[:, : old.shape[1]].reshape(old.shape)
        for new, old in zip(gradients, arrays[:3], strict=True)
    )


def _kernel_inputs(q_btnj, k_bskj, v_bskh, start_bt, end_bt, blocks, scale):
    """Arguments of the Pallas kernels: scaled queries, heads as lanes, whole blocks."""
    factor = scale * LOG2_E  # see softmax_base.py
    if abs(factor - 1) > 1e-6:
        q_btnj = (q_btnj.astype(jnp.float32) * factor).astype(q_btnj.dtype)
    q_bti, k_bsi, v_bsi = (_flatten_heads(array) for array in (q_btnj, k_bskj, v_bskh))
    q_bti, start_bt, end_bt = (_pad(array, blocks[0]) for array in (q_bti, start_bt, end_bt))
    return q_bti, _pad(k_bsi, blocks[1]), _pad(v_bsi, blocks[1]), start_bt, end_bt


def _flatten_heads(array: jax.Array) -> jax.Array:
    """[B, T, N, H] -> [B, T, N * H]."""
    return array.reshape(*array.shape[:2], -1)


def _pad(array: jax.Array, block: int) -> jax.Array:
    """Pads axis 1 to whole blocks with zeros: keys no query sees, queries that see nothing."""
    return jnp.pad(array, [(0, 0), (0, -array.shape[1] % block)] + [(0, 0)] * (array.ndim - 2))


def _group_by_key_head(array_btn: jax.Array, num_key_heads: int) -> jax.Array:
    """[B, T, N] -> [B, K, N / K, T]."""
    return jnp.moveaxis(array_btn.reshape(*array_btn.shape[:2], num_key_heads, -1), 1, 3)
