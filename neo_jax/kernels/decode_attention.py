"""Decode attention: one query per lane over the blocks of its sequence.

A token's heads lie side by side in the pool, [l, num_blocks, block_size, K * J]. One product of all
keys with block-diagonal queries gives the scores, here of 4 query heads and 2 key heads:

    query head 0  [ q0  0  ]
    query head 1  [ q1  0  ]      x  key of a token [ k0 k1 ]
    query head 2  [ 0   q2 ]
    query head 3  [ 0   q3 ]

That is more FLOPs than a product per head, but keys need not be moved, and reading them takes
longer than the product. Values likewise.

The pool is never copied: XLA and the TPU kernel read a lane's blocks, a few at a time, with an
online softmax. A store is {"values": that array}, with int8 also {"scale": [l, num_blocks, K,
block_size] float32}; see `model/kv_cache.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from neo_jax.kernels.cache_blocks import in_hbm
from neo_jax.kernels.dense import MASK_VALUE, float32_einsum
from neo_jax.kernels.pallas_forward import NN, NT, dot
from neo_jax.kernels.shard_kernel import shard_kernel

NAME = "decode_attention"
LANES = 128
TOKENS = 256  # of a lane that XLA reads at once
KERNEL_TOKENS = 512  # that the kernel does


def decode_attention(q_b1nj, k, v, layer, block_table_bn, end_b, num_key_heads, scale, kernel=None):
    """Softmax attention of each lane's query over the first `end_b` keys of its blocks.

    Args:
      q_b1nj: [B, 1, N, J].
      k, v: stores of widths J and H.
      layer: whose part of the stores is read.
      block_table_bn: [B, n] int32, the lane's blocks in order, numbered on each device.
      end_b: [B] int32; a lane with 0 gets zeros.
      num_key_heads: K, over the whole mesh.
      kernel: True: the TPU kernel, interpreted where there is no TPU; None: the best.

    Returns:
      [B, 1, N, H]. A lane's result does not depend on the other lanes.
    """
    group = q_b1nj.shape[2] // num_key_heads
    run = functools.partial(_local_attention, group=group, scale=scale, kernel=kernel)
    arrays = (q_b1nj, k, v, jnp.asarray(layer), block_table_bn, end_b)
    return shard_kernel(run, arrays, out_like=0)


def _local_attention(q_b1nj, k, v, layer, block_table_bn, end_b, group, scale, kernel):
    _, _, n, j = q_b1nj.shape
    num_heads = n, n // group
    size, width_v = k["values"].shape[2], v["values"].shape[3] // num_heads[1]
    options = {"num_heads": num_heads, "scale": scale}
    xla = functools.partial(_xla, **options)
    arrays = (q_b1nj, k, v, layer, block_table_bn, end_b)
    if kernel is None and (j % LANES or width_v % LANES or size % LANES):
        return xla(*arrays)
    pallas = functools.partial(_pallas, **options)
    if kernel:
        xla = functools.partial(pallas, is_interpreted=True)
    return jax.lax.platform_dependent(*arrays, tpu=pallas, default=xla)


def _xla(q_b1nj, k, v, layer, block_table_bn, end_b, num_heads, scale):
    """A few blocks of every lane at a time, as many times as the longest lane needs."""
    einsum, q_bnx = float32_einsum(q_b1nj.dtype), _spread_queries(q_b1nj, num_heads)
    size = k["values"].shape[2]
    many = max(1, TOKENS // size)
    table_bn = jnp.pad(block_table_bn, [(0, 0), (0, -block_table_bn.shape[1] % many)])

    def step(number, state):
        running_max, total, z_bnx = state
        blocks_bm = jax.lax.dynamic_slice_in_dim(table_bn, number * many, many, axis=1)
        k_bsx, v_bsx = (_read(store, layer, blocks_bm, q_b1nj.dtype) for store in (k, v))
        scores_bns = scale * einsum("bnx,bsx->bns", q_bnx, k_bsx)
        key_s = number * many * size + jnp.arange(many * size)
        mask_bs = key_s < end_b[:, None]
        scores_bns = jnp.where(mask_bs[:, None], scores_bns, MASK_VALUE)
        new_max = jnp.maximum(running_max, jnp.max(scores_bns, axis=2))
        p_bns, rescale = jnp.exp(scores_bns - new_max[..., None]), jnp.exp(running_max - new_max)
        z_bnx = rescale[..., None] * z_bnx
        z_bnx += einsum("bns,bsx->bnx", p_bns.astype(v_bsx.dtype), v_bsx)
        return new_max, rescale * total + jnp.sum(p_bns, axis=2), z_bnx

    b, n, _ = q_bnx.shape
    # Above every score of an unseen key, so that its exponent is 0 from the first.
    state = jnp.full((b, n), MASK_VALUE / 2), jnp.zeros((b, n))
    state += (jnp.zeros((b, n, v["values"].shape[3])),)
    steps = -(-jnp.max(end_b) // (many * size))
    _, total, z_bnx = jax.lax.fori_loop(0, steps, step, state)
    z_bnx /= jnp.where(total == 0, 1, total)[..., None]
    return _gather_own_heads(z_bnx, num_heads).astype(q_b1nj.dtype)


def _read(store: dict, layer, blocks_bm, dtype) -> jax.Array:
    """[B, m * block_size, K * width] of one layer's blocks [B, m]."""
    part = {
        which: array.at[layer, blocks_bm].get(mode="promise_in_bounds")
        for which, array in store.items()
    }
    b, m, size, x = part["values"].shape
    if "scale" not in part:
        return part["values"].astype(dtype).reshape(b, m * size, x)
    heads = part["values"].reshape(b, m, size, part["scale"].shape[2], -1)
    return (heads * part["scale"].swapaxes(2, 3)[..., None]).reshape(b, m * size, x).astype(dtype)


def _spread_queries(q_b1nj: jax.Array, num_heads: tuple[int, int]) -> jax.Array:
    """[B, N, K * J]: each query in its own key head's place, among zeros."""
    b, _, n, _ = q_b1nj.shape
    return jnp.where(_is_own_head(num_heads), q_b1nj[:, 0, :, None], 0).reshape(b, n, -1)


def _gather_own_heads(z_bnx: jax.Array, num_heads: tuple[int, int]) -> jax.Array:
    """[B, 1, N, H]: of [B, N, K * H], what is in each query's own key head's place."""
    b, n, _ = z_bnx.shape
    z_bnkh = z_bnx.reshape(b, n, num_heads[1], -1)
    return jnp.sum(jnp.where(_is_own_head(num_heads), z_bnkh, 0), axis=2)[:, None]


def _is_own_head(num_heads: tuple[int, int]) -> jax.Array:
    n, k = num_heads
    return (jnp.arange(n)[:, None] // (n // k) == jnp.arange(k))[..., None]


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


def _pallas(q_b1nj, k, v, layer, block_table_bn, end_b, num_heads, scale, is_interpreted=False):
    q_bnx, arrays = _spread_queries(q_b1nj, num_heads), [k["values"], v["values"]]
    b, n, width_k = q_bnx.shape
    size, width_v = arrays[1].shape[2:]
    tokens = size * max(1, min(KERNEL_TOKENS // size, block_table_bn.shape[1]))
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
    z_bnx = pl.pallas_call(
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
    return _gather_own_heads(z_bnx, num_heads).astype(q_b1nj.dtype)
