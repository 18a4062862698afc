"""Interval attention that keeps no scores: a forward and a backward pass of the same blocks.

The backward pass gets the results and the logarithms of the softmax's sums, and computes the scores
again: in XLA (`blockwise`) or on TPUs in Pallas, whose kernels walk a block list.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from neo_jax.kernels import block_list as of
from neo_jax.kernels import blockwise, pallas_backward, pallas_forward

BLOCKS = (512, 512)  # queries, keys
LANES = 128  # the kernels take widths that are multiples of this


class BlockLists(NamedTuple):
    """The lists that the Pallas kernels walk; by keys only where the backward pass needs two."""

    q_major: tuple[jax.Array, jax.Array]
    kv_major: tuple[jax.Array, jax.Array] | None


def block_lists_of(
    start_bt, end_bt, num_keys: int, widths: tuple[int, int], itemsize: int
) -> BlockLists:
    """Of a device's queries [B, T] over so many keys, whose and whose values' widths are given."""
    blocks = blocks_for(start_bt.shape[1], num_keys)
    bounds = _filled(start_bt, blocks[0]), _filled(end_bt, blocks[0])
    size = num_keys + -num_keys % blocks[1]
    kv_major = needs_keys(num_keys, widths, itemsize)
    return BlockLists(
        of.q_major(*bounds, size, *blocks),
        of.kv_major(*bounds, size, *blocks) if kv_major else None,
    )


def needs_keys(num_keys: int, widths: tuple[int, int], itemsize: int) -> bool:
    """Whether the backward pass takes two walks, for want of fast memory."""
    return pallas_backward.fused_bytes(num_keys, *widths, itemsize) > pallas_backward.FAST_MEMORY


def blocks_for(num_queries: int, num_keys: int) -> tuple[int, int]:
    """Of queries and keys; short sequences have smaller ones."""
    return tuple(
        min(block, length + -length % LANES)
        for block, length in zip(BLOCKS, (num_queries, num_keys), strict=True)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def flash(q_btnj, k_bskj, v_bskh, start_bt, end_bt, block_list, scale, implementation):
    """`interval_attention` on one device.

    Args:
      block_list: None for "blockwise".
      implementation: "blockwise", "pallas", "interpreted" (Pallas without a TPU), or "auto":
        Pallas where this is compiled for a TPU.
    """
    return _forward(q_btnj, k_bskj, v_bskh, start_bt, end_bt, block_list, scale, implementation)[0]


def _forward(q_btnj, k_bskj, v_bskh, start_bt, end_bt, block_list, scale, implementation):
    arrays = (q_btnj, k_bskj, v_bskh, start_bt, end_bt)
    z_btnh, log_sum = _choose(implementation, _pallas, _blockwise)(*arrays, block_list, scale=scale)
    # Named as it is kept: with heads as a dimension it would be laid out anew, twice.
    z_btnh = checkpoint_name(_lanes(z_btnh), "attended").reshape(z_btnh.shape)
    log_sum = checkpoint_name(log_sum, "log_sum")
    return z_btnh, (*arrays, block_list, z_btnh, log_sum)


def _backward(scale, implementation, residuals, dz_btnh):
    run = _choose(implementation, _pallas_backward, _blockwise_backward)
    return *run(*residuals, dz_btnh, scale=scale), None, None, None


flash.defvjp(_forward, _backward)


def _choose(implementation: str, pallas, in_xla):
    if implementation == "blockwise":
        return in_xla
    if implementation != "auto":
        return functools.partial(pallas, is_interpreted=implementation == "interpreted")

    def run(*arrays, **options):
        return jax.lax.platform_dependent(
            *arrays,
            tpu=functools.partial(pallas, **options),
            default=functools.partial(in_xla, **options),
        )

    return run


def _blockwise(q_btnj, k_bskj, v_bskh, start_bt, end_bt, block_list, scale):
    z_btnh, log_sum = blockwise.forward(q_btnj, k_bskj, v_bskh, start_bt, end_bt, scale)
    return z_btnh, _by_key_head(log_sum, k_bskj.shape[2])


def _blockwise_backward(*residuals_and_dz, scale):
    *arrays, _, z_btnh, log_sum, dz_btnh = residuals_and_dz
    log_sum = jnp.moveaxis(log_sum, 3, 1).reshape(z_btnh.shape[:3])
    return blockwise.backward(*arrays, z_btnh, log_sum, dz_btnh, scale)


def _pallas(q_btnj, k_bskj, v_bskh, start_bt, end_bt, block_list, scale, is_interpreted=False):
    (b, t, n), (s, k) = q_btnj.shape[:3], k_bskj.shape[1:3]
    blocks = blocks_for(t, s)
    arrays = _flat(q_btnj, k_bskj, v_bskh, start_bt, end_bt, blocks, scale)
    z_bti, log_sum = pallas_forward.forward(
        *arrays, block_list.q_major, (n, k), blocks, is_interpreted
    )
    return z_bti[:, :t].reshape(b, t, n, -1), log_sum[..., :t]


def _pallas_backward(*residuals_and_dz, scale, is_interpreted=False):
    *arrays, block_list, z_btnh, log_sum, dz_btnh = residuals_and_dz
    (t, n), (s, k) = arrays[0].shape[1:3], arrays[1].shape[1:3]
    blocks = blocks_for(t, s)
    z_bti, dz_bti = (_filled(_lanes(array), blocks[0]) for array in (z_btnh, dz_btnh))
    log_sum = jnp.pad(log_sum, [(0, 0)] * 3 + [(0, -t % blocks[0])])
    gradients = pallas_backward.backward(
        *_flat(*arrays, blocks, scale),
        z_bti,
        log_sum,
        dz_bti,
        block_list,
        scale,
        (n, k),
        blocks,
        is_interpreted,
    )
    return tuple(
        new[:, : old.shape[1]].reshape(old.shape)
        for new, old in zip(gradients, arrays[:3], strict=True)
    )


def _flat(q_btnj, k_bskj, v_bskh, start_bt, end_bt, blocks, scale):
    """What the kernels take: scaled queries, heads as lanes, whole blocks."""
    factor = scale * np.log2(np.e)  # the kernels' scores are in powers of 2
    if abs(factor - 1) > 1e-6:
        q_btnj = (q_btnj.astype(jnp.float32) * factor).astype(q_btnj.dtype)
    q_bti, k_bsi, v_bsi = (_lanes(array) for array in (q_btnj, k_bskj, v_bskh))
    q_bti, start_bt, end_bt = (_filled(array, blocks[0]) for array in (q_bti, start_bt, end_bt))
    return q_bti, _filled(k_bsi, blocks[1]), _filled(v_bsi, blocks[1]), start_bt, end_bt


def _lanes(array: jax.Array) -> jax.Array:
    return array.reshape(*array.shape[:2], -1)


def _filled(array: jax.Array, block: int) -> jax.Array:
    """Zeros up to whole blocks of axis 1: keys that nobody sees, queries that see nothing."""
    return jnp.pad(array, [(0, 0), (0, -array.shape[1] % block)] + [(0, 0)] * (array.ndim - 2))


def _by_key_head(array_btn: jax.Array, num_key_heads: int) -> jax.Array:
    """[B, T, N] -> [B, K, N / K, T]."""
    return jnp.moveaxis(array_btn.reshape(*array_btn.shape[:2], num_key_heads, -1), 1, 3)
