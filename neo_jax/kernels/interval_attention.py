"""Attention in which every query sees one interval of keys.

q [B, T, N, J], k [B, S, K, J], v [B, S, K, H] -> [B, T, N, H], with N a multiple of K (grouped
heads) and J and H of any width. Interval bounds are positions along S. The softmax is float32.
Runs under a mesh; batch and heads may be split over it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from neo_jax.errors import InputError
from neo_jax.kernels import dense
from neo_jax.kernels.flash import LANES, BlockLists, block_lists_of, flash, needs_keys
from neo_jax.kernels.shard_kernel import is_on_device, partition, shard_kernel

IMPLEMENTATIONS = ("auto", "dense", "blockwise", "pallas", "interpreted")
SMALL = 512 * 512  # up to so many scores a head, all at once is best


def interval_attention(
    q_btnj: jax.Array,
    k_bskj: jax.Array,
    v_bskh: jax.Array,
    start_bt: jax.Array,
    end_bt: jax.Array,
    scale: float,
    block_list: BlockLists | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention of each query t over the keys start <= s < end. [B, T, N, H].

    A query that sees nothing gets zeros.

    Args:
      start_bt, end_bt: [B, T]; start >= end where nothing is seen.
      block_list: from `make_block_list`, where many layers share the intervals.
      implementation: "dense": all scores at once; "blockwise": in XLA, in bounded memory;
        "pallas": the TPU kernel; "interpreted": that kernel without a TPU; "auto": the best.

    Raises:
      InputError: when the named one cannot do it.
    """
    if implementation not in IMPLEMENTATIONS:
        raise InputError(f"attention {implementation!r}: use one of {', '.join(IMPLEMENTATIONS)}")
    run = functools.partial(_on_device, scale=scale, implementation=implementation)
    arrays = (q_btnj, k_bskj, v_bskh, start_bt, end_bt, block_list)
    return shard_kernel(run, arrays, out_like=0)


def make_block_list(
    start_bt: jax.Array, end_bt: jax.Array, num_keys: int, widths: tuple[int, int], itemsize: int
) -> BlockLists | None:
    """What the TPU kernel derives from intervals, to be computed once for many layers.

    Args:
      start_bt, end_bt: [B, T].
      num_keys: S.
      widths: J and H.
      itemsize: bytes of a number of q, k and v.
    """
    run = functools.partial(block_lists_of, num_keys=num_keys, widths=widths, itemsize=itemsize)
    if start_bt.shape[1] * num_keys <= SMALL:
        return None
    if is_on_device():
        return run(start_bt, end_bt)
    bounds = partition(start_bt)
    kv_major = needs_keys(num_keys, widths, itemsize)
    out_specs = BlockLists((P(bounds[0]),) * 2, (P(bounds[0]),) * 2 if kv_major else None)
    return jax.shard_map(run, in_specs=(bounds, bounds), out_specs=out_specs, check_vma=False)(
        start_bt, end_bt
    )


def _on_device(q_btnj, k_bskj, v_bskh, start_bt, end_bt, block_list, scale, implementation):
    end_bt = jnp.maximum(start_bt, end_bt)  # kernels take the difference as a length
    arrays = (q_btnj, k_bskj, v_bskh, start_bt, end_bt)
    num_queries, num_keys = q_btnj.shape[1], k_bskj.shape[1]
    widths = k_bskj.shape[3], v_bskh.shape[3]
    if implementation == "auto":
        if num_queries * num_keys <= SMALL:
            implementation = "dense"
        elif any(width % LANES for width in widths):
            implementation = "blockwise"
    if implementation == "dense":
        return dense.attend(*arrays, scale)
    if implementation == "blockwise":
        return flash(*arrays, None, scale, implementation)
    if implementation == "pallas" and any(width % LANES for width in widths):
        raise InputError(f"attention 'pallas' takes widths of whole {LANES}s, not {widths}")
    block_list = block_list or block_lists_of(
        start_bt, end_bt, num_keys, widths, k_bskj.dtype.itemsize
    )
    return flash(*arrays, block_list, scale, implementation)
