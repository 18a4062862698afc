"""Interval attention on TPUs: the backward kernels, which compute the scores again.

Fused: one walk in the order of queries gives all gradients. Those of a row's keys and values lie
in fast memory, in float32, until the row is done; they do not grow with the number of query heads.
Where they do not fit, two walks: by queries for the queries' gradients, by keys for the others.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from neo_jax.kernels import block_list as of
from neo_jax.kernels.pallas_forward import both_ways, dot, index_maps, scores

NAME = "interval_attention_backward"
_PLAIN = (((1,), (0,)), ((), ()))
_ROWS_BY_ROWS = (((1,), (1,)), ((), ()))
_COLUMNS_BY_ROWS = (((0,), (0,)), ((), ()))
_LN_2 = float(np.log(2))  # the scores are in powers of 2
FAST_MEMORY = 48 << 20  # bytes that the fused kernel may take; from v5e on there are 64 MiB or more


def _own(refs, g, group):
    """[1, queries]: sums over a head of z * dz, which the softmax takes from all its d scores."""
    *_, z_ref, dz_ref, _ = refs
    width = z_ref.shape[1] // group
    z, dz = (ref[:, g * width : (g + 1) * width].astype(jnp.float32) for ref in (z_ref, dz_ref))
    return jnp.sum((z * dz).T, axis=0, keepdims=True)


def _gradients(visit, refs, g, group, is_partly, delta):
    """A head's q and dz, and p and d scores [keys, queries] in their type."""
    q_ref, k_ref, v_ref, start_ref, end_ref, _, dz_ref, log_sum_ref = refs
    width_q, width_v = q_ref.shape[1] // group, dz_ref.shape[1] // group
    q = q_ref[:, g * width_q : (g + 1) * width_q]
    dz = dz_ref[:, g * width_v : (g + 1) * width_v]
    scores_sq = scores(visit, q, k_ref[...], start_ref, end_ref, is_partly)
    p = jnp.exp2(scores_sq - log_sum_ref[g : g + 1])
    dp = dot(v_ref[...], dz, _ROWS_BY_ROWS)
    dscores = p * (dp - delta)
    return q, dz, p.astype(q.dtype), dscores.astype(q.dtype)


def _fused_kernel(visits_ref, *refs, group, scale, num_query_blocks):
    *inputs, dq_ref, dk_ref, dv_ref, dq_sum, delta_ref, dk_sum, dv_sum = refs
    k_ref = inputs[1]
    step_number, last_step = pl.program_id(1), pl.num_programs(1) - 1
    visit = visits_ref[step_number]

    def row(number):
        return jax.lax.div(of.query_block(visits_ref[number]), num_query_blocks)

    before = jnp.maximum(step_number - 1, 0)

    @pl.when((step_number == 0) | (row(before) != row(step_number)))
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @pl.when((visit & of.FIRST) != 0)
    def _():
        dq_sum[...] = jnp.zeros_like(dq_sum)
        for g in range(group):
            delta_ref[g] = _own(inputs, g, group)

    def step(is_partly):
        width_q, block_k = k_ref.shape[1], k_ref.shape[0]
        dk, dv = 0.0, 0.0
        for g in range(group):
            q, dz, p, dscores = _gradients(visit, inputs, g, group, is_partly, delta_ref[g])
            dv += dot(p, dz, _PLAIN)
            dk += dot(dscores, q, _PLAIN)
            dq_sum[:, g * width_q : (g + 1) * width_q] += dot(dscores, k_ref[...], _COLUMNS_BY_ROWS)
        here = pl.ds(pl.multiple_of(of.key_block(visit) * block_k, block_k), block_k)
        dk_sum[here] += dk
        dv_sum[here] += dv

    both_ways(visit, step)

    @pl.when((visit & of.LAST) != 0)
    def _():
        dq_ref[...] = (scale * dq_sum[...]).astype(dq_ref.dtype)

    next_step = jnp.minimum(step_number + 1, last_step)

    @pl.when((step_number == last_step) | (row(next_step) != row(step_number)))
    def _():
        dk_ref[...] = (_LN_2 * dk_sum[...]).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)


def _queries_kernel(visits_ref, *refs, group, scale):
    *inputs, dq_ref, dq_sum, delta_ref = refs
    k_ref = inputs[1]
    visit = visits_ref[pl.program_id(1)]

    @pl.when((visit & of.FIRST) != 0)
    def _():
        dq_sum[...] = jnp.zeros_like(dq_sum)
        for g in range(group):
            delta_ref[g] = _own(inputs, g, group)

    def step(is_partly):
        width_q = k_ref.shape[1]
        for g in range(group):
            *_, dscores = _gradients(visit, inputs, g, group, is_partly, delta_ref[g])
            dq_sum[:, g * width_q : (g + 1) * width_q] += dot(dscores, k_ref[...], _COLUMNS_BY_ROWS)

    both_ways(visit, step)

    @pl.when((visit & of.LAST) != 0)
    def _():
        dq_ref[...] = (scale * dq_sum[...]).astype(dq_ref.dtype)


def _keys_kernel(visits_ref, *refs, group):
    *inputs, dk_ref, dv_ref, dk_sum, dv_sum = refs
    visit = visits_ref[pl.program_id(1)]

    @pl.when((visit & of.FIRST) != 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def step(is_partly):
        dk, dv = 0.0, 0.0
        for g in range(group):
            delta = _own(inputs, g, group)
            q, dz, p, dscores = _gradients(visit, inputs, g, group, is_partly, delta)
            dv += dot(p, dz, _PLAIN)
            dk += dot(dscores, q, _PLAIN)
        dk_sum[...] += dk
        dv_sum[...] += dv

    both_ways(visit, step)

    @pl.when((visit & of.LAST) != 0)
    def _():
        dk_ref[...] = (_LN_2 * dk_sum[...]).astype(dk_ref.dtype)
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
    block_list,
    scale,
    num_heads,
    blocks,
    is_interpreted,
):
    """Gradients of q (as it was before it was scaled), k and v.

    Arguments as in `pallas_forward.forward`, but `block_list` is a `flash.BlockLists`; `log_sum`
    as it returns it.
    """
    n, k = num_heads
    (b, t), s, group = q_bti.shape[:2], k_bsi.shape[1], n // k
    width_q, width_v = k_bsi.shape[2] // k, v_bsi.shape[2] // k
    block_q, block_k = blocks
    arrays = (q_bti, k_bsi, v_bsi, start_bt[:, None], end_bt[:, None], z_bti, dz_bti, log_sum)
    of_queries, of_keys, of_row, of_sums = index_maps(t // block_q)
    in_specs = [
        pl.BlockSpec((None, block_q, group * width_q), of_queries),
        pl.BlockSpec((None, block_k, width_q), of_keys),
        pl.BlockSpec((None, block_k, width_v), of_keys),
        pl.BlockSpec((None, 1, block_q), of_row),
        pl.BlockSpec((None, 1, block_q), of_row),
        pl.BlockSpec((None, block_q, group * width_v), of_queries),
        pl.BlockSpec((None, block_q, group * width_v), of_queries),
        pl.BlockSpec((None, None, group, block_q), of_sums),
    ]
    pairs = b * t * s * n // 4
    memory = fused_bytes(s, width_q, width_v, q_bti.dtype.itemsize)

    def run(kernel, block_list, out, scratch, name, products, memory=None):
        listed, total = block_list
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(k, total[0]),
                in_specs=in_specs,
                out_specs=[block for _, block in out],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for like, _ in out],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=memory
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * pairs * products,
                transcendentals=pairs,
                bytes_accessed=2 * sum(array.nbytes for array in (q_bti, k_bsi, v_bsi, dz_bti)),
            ),
            name=name,
            interpret=is_interpreted,
        )(listed, *arrays)

    dq = (q_bti, pl.BlockSpec((None, block_q, group * width_q), of_queries))
    dq_sum, delta = (block_q, group * width_q), (group, 1, block_q)
    if block_list.kv_major is None:

        def of_whole_row(head, step, block_list):
            return of_queries(head, step, block_list)[0], 0, head

        return run(
            functools.partial(
                _fused_kernel, group=group, scale=scale, num_query_blocks=t // block_q
            ),
            block_list.q_major,
            [
                dq,
                (k_bsi, pl.BlockSpec((None, s, width_q), of_whole_row)),
                (v_bsi, pl.BlockSpec((None, s, width_v), of_whole_row)),
            ],
            [dq_sum, delta, (s, width_q), (s, width_v)],
            NAME,
            3 * width_q + 2 * width_v,
            memory + FAST_MEMORY // 3,
        )
    (dq_bti,) = run(
        functools.partial(_queries_kernel, group=group, scale=scale),
        block_list.q_major,
        [dq],
        [dq_sum, delta],
        NAME + "_queries",
        2 * width_q + width_v,
    )
    dk_bsi, dv_bsi = run(
        functools.partial(_keys_kernel, group=group),
        block_list.kv_major,
        [
            (k_bsi, pl.BlockSpec((None, block_k, width_q), of_keys)),
            (v_bsi, pl.BlockSpec((None, block_k, width_v), of_keys)),
        ],
        [(block_k, width_q), (block_k, width_v)],
        NAME + "_keys",
        2 * width_q + 2 * width_v,
    )
    return dq_bti, dk_bsi, dv_bsi


def fused_bytes(num_keys: int, width_q: int, width_v: int, itemsize: int) -> int:
    """Fast memory for a row's gradients of keys and values: sums, and results twice over."""
    return num_keys * (width_q + width_v) * (4 + 2 * itemsize)
