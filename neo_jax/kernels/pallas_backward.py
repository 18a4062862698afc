"""Interval attention on TPUs: the backward kernels, which recompute the scores.

    fused kernel    q-major list     dq, dk, dv
    two kernels     q-major list     dq
                    kv-major list    dk, dv

The fused kernel keeps dk and dv of a whole row in VMEM, in float32, until the row is done. Their
size does not depend on the number of query heads. Rows for which they do not fit take two kernels.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from neo_jax.kernels.block_list import FIRST, LAST, key_block, query_block
from neo_jax.kernels.pallas_forward import NN, NT, TN, dot, index_maps, run_step, scores
from neo_jax.kernels.softmax_base import LN_2

NAME = "interval_attention_backward"
FUSED_VMEM_LIMIT = 48 << 20  # bytes that dk and dv may take; from v5e on VMEM has 64 MiB or more


def _delta(refs, g, group):
    """[1, queries]: sum(z * dz) over a head's channels, as in the FlashAttention paper."""
    *_, z_ref, dz_ref, _ = refs
    width = z_ref.shape[1] // group
    z, dz = (ref[:, g * width : (g + 1) * width].astype(jnp.float32) for ref in (z_ref, dz_ref))
    return jnp.sum((z * dz).T, axis=0, keepdims=True)


def _score_gradients(entry, refs, g, group, is_partial, delta):
    """A head's q and dz, and the probabilities and gradients of scores [keys, queries]."""
    q_ref, k_ref, v_ref, start_ref, end_ref, _, dz_ref, log_sum_ref = refs
    width_q, width_v = q_ref.shape[1] // group, dz_ref.shape[1] // group
    q = q_ref[:, g * width_q : (g + 1) * width_q]
    dz = dz_ref[:, g * width_v : (g + 1) * width_v]
    scores_sq = scores(entry, q, k_ref[...], start_ref, end_ref, is_partial)
    p = jnp.exp2(scores_sq - log_sum_ref[g : g + 1])
    dp = dot(v_ref[...], dz, NT)
    dscores = p * (dp - delta)
    return q, dz, p.astype(q.dtype), dscores.astype(q.dtype)


def _fused_kernel(entries_ref, *refs, group, scale, num_query_blocks):
    *inputs, dq_ref, dk_ref, dv_ref, dq_sum, delta_ref, dk_sum, dv_sum = refs
    k_ref = inputs[1]
    step_number, last_step = pl.program_id(1), pl.num_programs(1) - 1
    entry = entries_ref[step_number]

    def row(number):
        return jax.lax.div(query_block(entries_ref[number]), num_query_blocks)

    previous_step = jnp.maximum(step_number - 1, 0)

    @pl.when((step_number == 0) | (row(previous_step) != row(step_number)))
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @pl.when((entry & FIRST) != 0)
    def _():
        dq_sum[...] = jnp.zeros_like(dq_sum)
        for g in range(group):
            delta_ref[g] = _delta(inputs, g, group)

    def step(is_partial):
        width_q, block_k = k_ref.shape[1], k_ref.shape[0]
        dk, dv = 0.0, 0.0
        for g in range(group):
            q, dz, p, dscores = _score_gradients(entry, inputs, g, group, is_partial, delta_ref[g])
            dv += dot(p, dz, NN)
            dk += dot(dscores, q, NN)
            dq_sum[:, g * width_q : (g + 1) * width_q] += dot(dscores, k_ref[...], TN)
        keys = pl.ds(pl.multiple_of(key_block(entry) * block_k, block_k), block_k)
        dk_sum[keys] += dk
        dv_sum[keys] += dv

    run_step(entry, step)

    @pl.when((entry & LAST) != 0)
    def _():
        dq_ref[...] = (scale * dq_sum[...]).astype(dq_ref.dtype)

    next_step = jnp.minimum(step_number + 1, last_step)

    @pl.when((step_number == last_step) | (row(next_step) != row(step_number)))
    def _():
        dk_ref[...] = (LN_2 * dk_sum[...]).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)


def _queries_kernel(entries_ref, *refs, group, scale):
    *inputs, dq_ref, dq_sum, delta_ref = refs
    k_ref = inputs[1]
    entry = entries_ref[pl.program_id(1)]

    @pl.when((entry & FIRST) != 0)
    def _():
        dq_sum[...] = jnp.zeros_like(dq_sum)
        for g in range(group):
            delta_ref[g] = _delta(inputs, g, group)

    def step(is_partial):
        width_q = k_ref.shape[1]
        for g in range(group):
            *_, dscores = _score_gradients(entry, inputs, g, group, is_partial, delta_ref[g])
            dq_sum[:, g * width_q : (g + 1) * width_q] += dot(dscores, k_ref[...], TN)

    run_step(entry, step)

    @pl.when((entry & LAST) != 0)
    def _():
        dq_ref[...] = (scale * dq_sum[...]).astype(dq_ref.dtype)


def _keys_kernel(entries_ref, *refs, group):
    *inputs, dk_ref, dv_ref, dk_sum, dv_sum = refs
    entry = entries_ref[pl.program_id(1)]

    @pl.when((entry & FIRST) != 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def step(is_partial):
        dk, dv = 0.0, 0.0
        for g in range(group):
            delta = _delta(inputs, g, group)
            q, dz, p, dscores = _score_gradients(entry, inputs, g, group, is_partial, delta)
            dv += dot(p, dz, NN)
            dk += dot(dscores, q, NN)
        dk_sum[...] += dk
        dv_sum[...] += dv

    run_step(entry, step)

    @pl.when((entry & LAST) != 0)
    def _():
        dk_ref[...] = (LN_2 * dk_sum[...]).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)


def backward(
    q_bti,
    k_bsi,
    v_bsi,
    start_bt,
    end_bt,
    z_bti,
    log_sum,
    dz_bti,
    block_lists,
    scale,
    num_heads,
    blocks,
    is_interpreted,
):
    """Gradients of q (before it was scaled for base 2), k and v.

    Args:
      q_bti, k_bsi, v_bsi, start_bt, end_bt, num_heads, blocks: as in `pallas_forward.forward`.
      z_bti, log_sum: as `pallas_forward.forward` returns them.
      dz_bti: [B, T, N * H], the gradient of z.
      block_lists: a `flash.BlockLists`.
      scale: of `interval_attention`.
    """
    n, k = num_heads
    (b, t), s, group = q_bti.shape[:2], k_bsi.shape[1], n // k
    width_q, width_v = k_bsi.shape[2] // k, v_bsi.shape[2] // k
    block_q, block_k = blocks
    arrays = (q_bti, k_bsi, v_bsi, start_bt[:, None], end_bt[:, None], z_bti, dz_bti, log_sum)
    q_map, kv_map, bounds_map, log_sum_map = index_maps(t // block_q)
    in_specs = [
        pl.BlockSpec((None, block_q, group * width_q), q_map),
        pl.BlockSpec((None, block_k, width_q), kv_map),
        pl.BlockSpec((None, block_k, width_v), kv_map),
        pl.BlockSpec((None, 1, block_q), bounds_map),
        pl.BlockSpec((None, 1, block_q), bounds_map),
        pl.BlockSpec((None, block_q, group * width_v), q_map),
        pl.BlockSpec((None, block_q, group * width_v), q_map),
        pl.BlockSpec((None, None, group, block_q), log_sum_map),
    ]
    pairs = b * t * s * n // 4
    dk_dv_bytes = fused_vmem_bytes(s, width_q, width_v, q_bti.dtype.itemsize)

    def run(kernel, block_list, out, scratch, name, products, vmem_limit=None):
        entries, num_entries = block_list
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(k, num_entries[0]),
                in_specs=in_specs,
                out_specs=[block for _, block in out],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for like, _ in out],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * pairs * products,
                transcendentals=pairs,
                bytes_accessed=2 * sum(array.nbytes for array in (q_bti, k_bsi, v_bsi, dz_bti)),
            ),
            name=name,
            interpret=is_interpreted,
        )(entries, *arrays)

    dq = (q_bti, pl.BlockSpec((None, block_q, group * width_q), q_map))
    dq_sum, delta = (block_q, group * width_q), (group, 1, block_q)
    if block_lists.kv_major is None:

        def whole_row_map(head, step, entries):
            return q_map(head, step, entries)[0], 0, head

        return run(
            functools.partial(
                _fused_kernel, group=group, scale=scale, num_query_blocks=t // block_q
            ),
            block_lists.q_major,
            [
                dq,
                (k_bsi, pl.BlockSpec((None, s, width_q), whole_row_map)),
                (v_bsi, pl.BlockSpec((None, s, width_v), whole_row_map)),
            ],
            [dq_sum, delta, (s, width_q), (s, width_v)],
            NAME,
            3 * width_q + 2 * width_v,
            dk_dv_bytes + FUSED_VMEM_LIMIT // 3,
        )
    (dq_bti,) = run(
        functools.partial(_queries_kernel, group=group, scale=scale),
        block_lists.q_major,
        [dq],
        [dq_sum, delta],
        NAME + "_queries",
        2 * width_q + width_v,
    )
    dk_bsi, dv_bsi = run(
        functools.partial(_keys_kernel, group=group),
        block_lists.kv_major,
        [
            (k_bsi, pl.BlockSpec((None, block_k, width_q), kv_map)),
            (v_bsi, pl.BlockSpec((None, block_k, width_v), kv_map)),
        ],
        [(block_k, width_q), (block_k, width_v)],
        NAME + "_keys",
        2 * width_q + 2 * width_v,
    )
    return dq_bti, dk_bsi, dv_bsi


def fused_vmem_bytes(num_keys: int, width_q: int, width_v: int, itemsize: int) -> int:
    """VMEM for dk and dv of a row: float32 sums, and a double-buffered result."""
    return num_keys * (width_q + width_v) * (4 + 2 * itemsize)
