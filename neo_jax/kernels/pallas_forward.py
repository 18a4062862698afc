"""Interval attention on TPUs: the forward kernel.

Heads lie side by side as lanes, [B, T, N * J], so nothing is transposed on the way in or out. A
step takes one entry of the block list, for all query heads that share a key head: the mask is
made and keys are read once for all of them. Scores are kept with keys down and queries across, so
that what a query has once (its interval, maximum and sum) is a row of lanes.

Scores come in powers of 2: queries are scaled by log2(e) beforehand (`flash.py`).
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from neo_jax.kernels import block_list as of
from neo_jax.kernels.dense import MASK_VALUE

NAME = "interval_attention_forward"
_ROWS_BY_ROWS = (((1,), (1,)), ((), ()))
_COLUMNS_BY_ROWS = (((0,), (0,)), ((), ()))


def dot(a: jax.Array, b: jax.Array, dimensions) -> jax.Array:
    """A product with float32 sums, of float32 factors in full precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def scores(visit, q, k, start_ref, end_ref, is_partly: bool) -> jax.Array:
    """[keys, queries] of one head; MASK_VALUE where a query does not see a key."""
    scores_sq = dot(k, q, _ROWS_BY_ROWS)
    if not is_partly:
        return scores_sq
    first = of.key_block(visit) * k.shape[0]
    key_sq = first + jax.lax.broadcasted_iota(jnp.int32, scores_sq.shape, 0)
    # One comparison for both bounds: below the start, the difference is huge without its sign.
    length = (end_ref[...] - start_ref[...]).astype(jnp.uint32)
    mask = (key_sq - start_ref[...]).astype(jnp.uint32) < length
    return jnp.where(mask, scores_sq, MASK_VALUE)


def both_ways(visit, step) -> None:
    """Runs `step(is_partly)`: most blocks need no mask."""
    is_partly = (visit & of.PARTLY) != 0
    pl.when(is_partly)(lambda: step(True))
    pl.when(jnp.logical_not(is_partly))(lambda: step(False))


def _kernel(
    visits_ref,
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
    visit = visits_ref[pl.program_id(1)]
    group, width_v, _ = acc_ref.shape
    width_q = q_ref.shape[1] // group

    @pl.when((visit & of.FIRST) != 0)
    def _():
        # Above every score of an unseen key, so that its exponent is 0 from the first.
        max_ref[...] = jnp.full_like(max_ref, MASK_VALUE / 2)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def step(is_partly):
        k, v = k_ref[...], v_ref[...]
        for g in range(group):
            q = q_ref[:, g * width_q : (g + 1) * width_q]
            scores_sq = scores(visit, q, k, start_ref, end_ref, is_partly)
            running_max = jnp.maximum(max_ref[g], jnp.max(scores_sq, axis=0, keepdims=True))
            p = jnp.exp2(scores_sq - running_max)
            rescale = jnp.exp2(max_ref[g] - running_max)
            max_ref[g] = running_max
            sum_ref[g] = rescale * sum_ref[g] + jnp.sum(p, axis=0, keepdims=True)
            acc_ref[g] = rescale * acc_ref[g] + dot(v, p.astype(v.dtype), _COLUMNS_BY_ROWS)

    both_ways(visit, step)

    @pl.when((visit & of.LAST) != 0)
    def _():
        for g in range(group):
            is_empty = sum_ref[g] == 0
            total = jnp.where(is_empty, 1, sum_ref[g])
            z = (acc_ref[g] / total).T
            z_ref[:, g * width_v : (g + 1) * width_v] = z.astype(z_ref.dtype)
            log_sum_ref[g] = jnp.where(is_empty, 0, max_ref[g] + jnp.log2(total))[0]


def forward(q_bti, k_bsi, v_bsi, start_bt, end_bt, block_list, num_heads, blocks, is_interpreted):
    """Attention of scaled queries.

    Args:
      q_bti: [B, T, N * J], k_bsi: [B, S, K * J], v_bsi: [B, S, K * H].
      start_bt, end_bt: [B, T] int32.
      block_list: from `block_list.q_major` for the same blocks.
      num_heads: (N, K).
      blocks: (queries, keys) of a block; T and S are multiples.

    Returns:
      z [B, T, N * H], and log2 of the sums of 2^scores [B, K, N / K, T] float32 (empty: 0).
    """
    n, k = num_heads
    b, t, s = *q_bti.shape[:2], k_bsi.shape[1]
    group, width_q, width_v = n // k, k_bsi.shape[2] // k, v_bsi.shape[2] // k
    block_q, block_k = blocks
    of_queries, of_keys, of_row, of_sums = index_maps(t // block_q)
    listed, total = block_list
    pairs = b * t * s * n // 4  # what XLA is told of the work, which the data decide
    return pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(k, total[0]),
            in_specs=[
                pl.BlockSpec((None, block_q, group * width_q), of_queries),
                pl.BlockSpec((None, block_k, width_q), of_keys),
                pl.BlockSpec((None, block_k, width_v), of_keys),
                pl.BlockSpec((None, 1, block_q), of_row),
                pl.BlockSpec((None, 1, block_q), of_row),
            ],
            out_specs=[
                pl.BlockSpec((None, block_q, group * width_v), of_queries),
                pl.BlockSpec((None, None, group, block_q), of_sums),
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
    )(listed, q_bti, k_bsi, v_bsi, start_bt[:, None], end_bt[:, None])


def index_maps(num_query_blocks: int):
    """(head, step, block_list) -> the block of queries, keys, intervals, and sums of queries."""

    def place(step, block_list):
        block = of.query_block(block_list[step])
        row = jax.lax.div(block, num_query_blocks)
        return row, block - row * num_query_blocks, of.key_block(block_list[step])

    def of_queries(head, step, block_list):
        row, block, _ = place(step, block_list)
        return row, block, head

    def of_keys(head, step, block_list):
        row, _, block = place(step, block_list)
        return row, block, head

    def of_row(head, step, block_list):
        row, block, _ = place(step, block_list)
        return row, 0, block

    def of_sums(head, step, block_list):
        row, block, _ = place(step, block_list)
        return row, head, 0, block

    return of_queries, of_keys, of_row, of_sums
