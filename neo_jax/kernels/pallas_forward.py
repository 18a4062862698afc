"""Interval attention on TPUs: the forward kernel.

Heads lie side by side as lanes, [B, T, N * J], so nothing is transposed on the way in or out. A
grid step computes one entry of the block list for all query heads that share a key head: they share
the mask and one read of the keys. Scores are [keys, queries], so that the numbers of a query (its
interval, maximum and sum) are a row of lanes. The softmax has base 2 (`softmax_base.py`).
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from neo_jax.kernels.block_list import FIRST, LAST, PARTIAL, key_block, query_block
from neo_jax.kernels.dense import MASK_VALUE

NAME = "interval_attention_forward"
# Dimension numbers of a product of two matrices, N as it is and T transposed, as in BLAS.
NN = (((1,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))
TN = (((0,), (0,)), ((), ()))


def dot(a: jax.Array, b: jax.Array, dimensions) -> jax.Array:
    """A product that accumulates in float32; float32 factors are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def scores(entry, q, k, start_ref, end_ref, is_partial: bool) -> jax.Array:
    """The scores [keys, queries] of one head; MASK_VALUE where a query does not see a key."""
    scores_sq = dot(k, q, NT)
    if not is_partial:
        return scores_sq
    first = key_block(entry) * k.shape[0]
    key_sq = first + jax.lax.broadcasted_iota(jnp.int32, scores_sq.shape, 0)
    # One comparison for both bounds: before the start, the unsigned difference wraps round.
    length = (end_ref[...] - start_ref[...]).astype(jnp.uint32)
    mask = (key_sq - start_ref[...]).astype(jnp.uint32) < length
    return jnp.where(mask, scores_sq, MASK_VALUE)


def run_step(entry, step) -> None:
    """Runs `step(is_partial)`, compiled with and without the mask: most blocks are full."""
    is_partial = (entry & PARTIAL) != 0
    pl.when(is_partial)(lambda: step(True))
    pl.when(jnp.logical_not(is_partial))(lambda: step(False))


def _kernel(
    entries_ref,
    q_ref,
    k_ref,
    v_ref,
    start_ref,
    end_ref,
    z_ref,
    log_sum_ref,
    max_ref,
    sum_ref,
    acc_ref,
):
    entry = entries_ref[pl.program_id(1)]
    group, width_v, _ = acc_ref.shape
    width_q = q_ref.shape[1] // group

    @pl.when((entry & FIRST) != 0)
    def _():
        # Above MASK_VALUE, so that masked keys get exp2(MASK_VALUE - running_max) = 0.
        max_ref[...] = jnp.full_like(max_ref, MASK_VALUE / 2)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def step(is_partial):
        k, v = k_ref[...], v_ref[...]
        for g in range(group):
            q = q_ref[:, g * width_q : (g + 1) * width_q]
            scores_sq = scores(entry, q, k, start_ref, end_ref, is_partial)
            running_max = jnp.maximum(max_ref[g], jnp.max(scores_sq, axis=0, keepdims=True))
            p = jnp.exp2(scores_sq - running_max)
            rescale = jnp.exp2(max_ref[g] - running_max)
            max_ref[g] = running_max
            sum_ref[g] = rescale * sum_ref[g] + jnp.sum(p, axis=0, keepdims=True)
            acc_ref[g] = rescale * acc_ref[g] + dot(v, p.astype(v.dtype), TN)

    run_step(entry, step)

    @pl.when((entry & LAST) != 0)
    def _():
        for g in range(group):
            is_empty = sum_ref[g] == 0
            total = jnp.where(is_empty, 1, sum_ref[g])
            z = (acc_ref[g] / total).T
            z_ref[:, g * width_v : (g + 1) * width_v] = z.astype(z_ref.dtype)
            log_sum_ref[g] = jnp.where(is_empty, 0, max_ref[g] + jnp.log2(total))[0]


def forward(q_bti, k_bsi, v_bsi, start_bt, end_bt, block_list, num_heads, blocks, is_interpreted):
    """Attention of queries that are scaled for base 2.

    Args:
      q_bti: [B, T, N * J], k_bsi: [B, S, K * J], v_bsi: [B, S, K * H].
      start_bt, end_bt: [B, T] int32.
      block_list: from `block_list.q_major`, for blocks of this size.
      num_heads: (N, K).
      blocks: (queries, keys) of a block; T and S are multiples.

    Returns:
      the attention output z [B, T, N * H], and log2(sum(2^scores)) [B, K, N / K, T] float32, which
      is 0 where a query sees nothing.
    """
    n, k = num_heads
    b, t, s = *q_bti.shape[:2], k_bsi.shape[1]
    group, width_q, width_v = n // k, k_bsi.shape[2] // k, v_bsi.shape[2] // k
    block_q, block_k = blocks
    q_map, kv_map, bounds_map, log_sum_map = index_maps(t // block_q)
    entries, num_entries = block_list
    pairs = b * t * s * n // 4  # an estimate for XLA: the true number depends on the data
    return pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(k, num_entries[0]),
            in_specs=[
                pl.BlockSpec((None, block_q, group * width_q), q_map),
                pl.BlockSpec((None, block_k, width_q), kv_map),
                pl.BlockSpec((None, block_k, width_v), kv_map),
                pl.BlockSpec((None, 1, block_q), bounds_map),
                pl.BlockSpec((None, 1, block_q), bounds_map),
            ],
            out_specs=[
                pl.BlockSpec((None, block_q, group * width_v), q_map),
                pl.BlockSpec((None, None, group, block_q), log_sum_map),
            ],
            scratch_shapes=[
                pltpu.VMEM((group, 1, block_q), jnp.float32),
                pltpu.VMEM((group, 1, block_q), jnp.float32),
                pltpu.VMEM((group, width_v, block_q), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((b, t, n * width_v), q_bti.dtype),
            jax.ShapeDtypeStruct((b, k, group, t), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * (width_q + width_v),
            transcendentals=pairs,
            bytes_accessed=2 * b * n * t * (width_q + width_v),
        ),
        name=NAME,
        interpret=is_interpreted,
    )(entries, q_bti, k_bsi, v_bsi, start_bt[:, None], end_bt[:, None])


def index_maps(num_query_blocks: int):
    """(head, step, entries) -> the block of q, of k and v, of interval bounds, and of log sums."""

    def locate(step, entries):
        block = query_block(entries[step])
        row = jax.lax.div(block, num_query_blocks)
        return row, block - row * num_query_blocks, key_block(entries[step])

    def q_map(head, step, entries):
        row, block, _ = locate(step, entries)
        return row, block, head

    def kv_map(head, step, entries):
        row, _, block = locate(step, entries)
        return row, block, head

    def bounds_map(head, step, entries):
        row, block, _ = locate(step, entries)
        return row, 0, block

    def log_sum_map(head, step, entries):
        row, block, _ = locate(step, entries)
        return row, head, 0, block

    return q_map, kv_map, bounds_map, log_sum_map
