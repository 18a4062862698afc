"""Attention in which every query sees one interval of keys.

q [B, T, N, J], k [B, S, K, J], v [B, S, K, H] -> [B, T, N, H]. N is a multiple of K (grouped-query
attention); J and H have any width. Interval bounds are positions along S. The softmax is float32.
It runs under a mesh, which may split batch and heads.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from neo_jax.errors import InputError
from neo_jax.kernels import dense
from neo_jax.kernels.flash import LANES, BlockLists, flash, local_block_lists, needs_kv_major
from neo_jax.kernels.shard_kernel import is_fully_manual, partition, shard_kernel

IMPLEMENTATIONS = ("auto", "dense", "blockwise", "pallas", "interpreted")
SMALL = 512 * 512  # scores of a head up to which "dense" is fastest


def interval_attention(
    q_btnj: jax.Array,
    k_bskj: jax.Array,
    v_bskh: jax.Array,
    start_bt: jax.Array,
    end_bt: jax.Array,
    scale: float,
    block_lists: BlockLists | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """softmax(scale q k) v for each query t over the keys start <= s < end: [B, T, N, H].

    A query that sees nothing gets zeros.

    Args:
      start_bt, end_bt: [B, T]; start >= end where nothing is seen.
      scale: of the scores; LN_2 costs nothing in the kernels, see `softmax_base.py`.
      block_lists: from `make_block_lists`, if many layers share the intervals.
      implementation: "dense": all scores at once; "blockwise": in XLA, in bounded memory;
        "pallas": the TPU kernel; "interpreted": that kernel without a TPU; "auto": the best.

    Raises:
      InputError: if there is no such implementation, or it does not take these widths.
    """
    if implementation not in IMPLEMENTATIONS:
        raise InputError(f"attention {implementation!r}: use one of {', '.join(IMPLEMENTATIONS)}")
    run = functools.partial(_local_attention, scale=scale, implementation=implementation)
    arrays = (q_btnj, k_bskj, v_bskh, start_bt, end_bt, block_lists)
    return shard_kernel(run, arrays, out_like=0)


def make_block_lists(
    start_bt: jax.Array, end_bt: jax.Array, num_keys: int, widths: tuple[int, int], itemsize: int
) -> BlockLists | None:
    """The block lists of the TPU kernels, to be computed once for many layers.

    None for so few scores that no kernel is used.

    Args:
      start_bt, end_bt: [B, T].
      num_keys: S.
      widths: J and H.
      itemsize: bytes of one element of q, k and v.
    """
    run = functools.partial(local_block_lists, num_keys=num_keys, widths=widths, itemsize=itemsize)
    if start_bt.shape[1] * num_keys <= SMALL:
        return None
    if is_fully_manual():
        return run(start_bt, end_bt)
    bounds = partition(start_bt)
    of_list = (P(bounds[0]), P(bounds[0]))
    is_two_kernels = needs_kv_major(num_keys, widths, itemsize)
    out_specs = BlockLists(of_list, of_list if is_two_kernels else None)
    return jax.shard_map(run, in_specs=(bounds, bounds), out_specs=out_specs, check_vma=False)(
        start_bt, end_bt
    )


def _local_attention(q_btnj, k_bskj, v_bskh, start_bt, end_bt, block_lists, scale, implementation):
    end_bt = jnp.maximum(start_bt, end_bt)  # the kernels compare with the length end - start
    arrays = (q_btnj, k_bskj, v_bskh, start_bt, end_bt)
    num_queries, num_keys = q_btnj.shape[1], k_bskj.shape[1]
    widths = k_bskj.shape[3], v_bskh.shape[3]
    if implementation == "auto":
        if num_queries * num_keys <= SMALL:
            implementation = "dense"
        elif any(width % LANES for width in widths):
            implementation = "blockwise"
    if implementation == "dense":
        return dense.attention(*arrays, scale)
    if implementation == "blockwise":
        return flash(*arrays, None, scale, implementation)
    if implementation == "pallas" and any(width % LANES for width in widths):
        raise InputError(f"attention 'pallas' takes widths of whole {LANES}s, not {widths}")
    block_lists = block_lists or local_block_lists(
        start_bt, end_bt, num_keys, widths, k_bskj.dtype.itemsize
    )
    return flash(*arrays, block_lists, scale, implementation)
