"""Attention of decoding on TPUs: one query per lane over the blocks that its table names.

A step takes some blocks of one lane. While it computes, the next ones are copied from the pool,
those of the next lane if this one has no more, so that memory is never idle.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from neo_jax.kernels.cache_blocks import in_hbm
from neo_jax.kernels.dense import MASK_VALUE
from neo_jax.kernels.pallas_forward import NN, NT, dot

NAME = "decode_attention"
TOKENS = 512  # of a step


def _kernel(layer_ref, table_ref, end_ref, q_ref, *refs, num_arrays, size, scale, group):
    """One lane, some blocks at a time, while the next ones are on their way from the pool."""
    pool, (z_ref, *refs) = refs[:num_arrays], refs[num_arrays:]
    buffers, (slot_ref, arrived, max_ref, sum_ref, acc_ref) = refs[:num_arrays], refs[num_arrays:]
    lane, tokens = pl.program_id(0), buffers[0].shape[1]

    def each_copy(lane, step, slot, act):
        """`act` on the copy of each block that the lane has in this step, of each array."""
        for place in range(0, tokens, size):

            @pl.when(step * tokens + place < end_ref[lane])
            def _(place=place):
                block = table_ref[lane, (step * tokens + place) // size]
                for number, (source, buffer) in enumerate(zip(pool, buffers, strict=True)):
                    here = pl.ds(place, size)
                    # Values have tokens down, scales across.
                    target = (slot, here) if number < 2 else (slot, slice(None), here)
                    act(
                        pltpu.make_async_copy(
                            source.at[layer_ref[0], block],
                            buffer.at[target],
                            arrived.at[slot, number],
                        )
                    )

    @pl.when(lane == 0)
    def _():
        for buffer in buffers[1::2]:  # values that are not there are still multiplied, by 0
            buffer[...] = jnp.zeros_like(buffer)
        slot_ref[0] = 0
        each_copy(0, 0, 0, lambda copy: copy.start())

    max_ref[...] = jnp.full_like(max_ref, MASK_VALUE / 2)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)
    steps = jnp.maximum(1, pl.cdiv(end_ref[lane], tokens))

    def step(number, _):
        slot, is_last = slot_ref[0], number + 1 == steps
        slot_ref[0] = 1 - slot

        @pl.when(lane + is_last < pl.num_programs(0))
        def _():
            following = lane + is_last, jnp.where(is_last, 0, number + 1)
            each_copy(*following, 1 - slot, lambda copy: copy.start())

        each_copy(lane, number, slot, lambda copy: copy.wait())
        key = end_ref[lane] - number * tokens
        _attend(q_ref, [buffer.at[slot] for buffer in buffers], key, scale, group,
                max_ref, sum_ref, acc_ref)  # fmt: skip

    jax.lax.fori_loop(0, steps, step, None)
    total = sum_ref[...]
    z_ref[...] = acc_ref[...] / jnp.where(total == 0, 1, total)


def _attend(q_ref, arrays, num_keys, scale, group, max_ref, sum_ref, acc_ref):
    """Takes the first `num_keys` of these keys into the lane's softmax."""
    k_ref, v_ref, *scales = arrays
    q = q_ref[...]
    scores_ns = scale * dot(q, k_ref[...].astype(q.dtype), NT)
    if scales:
        scores_ns *= _repeat_for_queries(scales[0][...], group)
    key_ns = jax.lax.broadcasted_iota(jnp.int32, scores_ns.shape, 1)
    scores_ns = jnp.where(key_ns < num_keys, scores_ns, MASK_VALUE)
    running_max = jnp.maximum(max_ref[...], jnp.max(scores_ns, axis=1, keepdims=True))
    p_ns = jnp.exp(scores_ns - running_max)
    rescale = jnp.exp(max_ref[...] - running_max)
    max_ref[...] = running_max
    sum_ref[...] = rescale * sum_ref[...] + jnp.sum(p_ns, axis=1, keepdims=True)
    if scales:
        p_ns *= _repeat_for_queries(scales[1][...], group)
    v = v_ref[...].astype(q.dtype)
    acc_ref[...] = rescale * acc_ref[...] + dot(p_ns.astype(q.dtype), v, NN)


def _repeat_for_queries(scale_ks: jax.Array, group: int) -> jax.Array:
    """[K, S] -> [N, S]: the scale of each query's own key head."""
    k, s = scale_ks.shape
    return jnp.broadcast_to(scale_ks[:, None], (k, group, s)).reshape(k * group, s)


def forward(q_bnx, k, v, layer, block_table_bn, end_b, num_heads, scale, is_interpreted=False):
    """[B, N, K * H] float32, of queries that are zero in the other heads' places.

    Args:
      q_bnx: [B, N, K * J].
      k, v, layer, block_table_bn, end_b: as in `decode_attention`.
      num_heads: (N, K).
    """
    arrays = [k["values"], v["values"]]
    b, n, width_k = q_bnx.shape
    size, width_v = arrays[1].shape[2:]
    tokens = size * max(1, min(TOKENS // size, block_table_bn.shape[1]))
    shapes = [(2, tokens, width_k), (2, tokens, width_v)]
    if "scale" in k:
        arrays += [k["scale"], v["scale"]]
        shapes += [(2, num_heads[1], tokens)] * 2
    buffers = [pltpu.VMEM(shape, array.dtype) for shape, array in zip(shapes, arrays, strict=True)]

    def lane_map(lane, layer, table, end):
        return lane, 0, 0

    arrays = arrays if is_interpreted else [in_hbm(array) for array in arrays]
    options = {"num_arrays": len(arrays), "size": size, "scale": scale}
    most = b * block_table_bn.shape[1] * size  # tokens; XLA is told of half of them
    return pl.pallas_call(
        functools.partial(_kernel, **options, group=num_heads[0] // num_heads[1]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(b,),
            in_specs=[
                pl.BlockSpec((None, n, width_k), lane_map),
                *[pl.BlockSpec(memory_space=pl.ANY)] * len(arrays),
            ],
            out_specs=pl.BlockSpec((None, n, width_v), lane_map),
            scratch_shapes=[
                *buffers,
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2, len(arrays))),
                pltpu.VMEM((n, 1), jnp.float32),
                pltpu.VMEM((n, 1), jnp.float32),
                pltpu.VMEM((n, width_v), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((b, n, width_v), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=most * n * (width_k + width_v),
            transcendentals=most * n // 2,
            bytes_accessed=most // 2 * (width_k + width_v) * arrays[0].dtype.itemsize,
        ),
        name=NAME,
        interpret=is_interpreted,
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        block_table_bn.astype(jnp.int32),
        end_b.astype(jnp.int32),
        q_bnx,
        *arrays,
    )
