"""Decode attention: one query per row over the key-value cache.

The cache keeps a token's heads side by side, [l, B, S, K * J]. One product of all keys with
block-diagonal queries gives the scores, here of 4 query heads and 2 key heads:

    query head 0  [ q0  0  ]
    query head 1  [ q1  0  ]      x  key of a token [ k0 k1 ]
    query head 2  [ 0   q2 ]
    query head 3  [ 0   q3 ]

That is more FLOPs than a product per head, but keys need not be moved, and reading them takes
longer than the product. Values likewise.

A store is {"values": that array}, with int8 also {"scale": [l, B, K, S] float32}; see
`model/kv_cache.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from neo_jax.kernels.dense import MASK_VALUE, float32_einsum
from neo_jax.kernels.pallas_forward import NN, NT, dot
from neo_jax.kernels.shard_kernel import shard_kernel

NAME = "decode_attention"
LANES = 128
BLOCKS = (512, 256, 128)  # keys of a block: the largest that divides the cache's length


def decode_attention(q_b1nj, k, v, layer, end_b, num_key_heads, scale, kernel=None):
    """softmax(scale q k) v of each row's query over its first `end_b` keys: [B, 1, N, H].

    Args:
      q_b1nj: [B, 1, N, J].
      k, v: stores of widths J and H.
      layer: index of the layer in the stores.
      end_b: [B] int32, 1 or more.
      num_key_heads: K, over the whole mesh.
      kernel: True: the TPU kernel, interpreted without a TPU; None: the fastest.
    """
    group = q_b1nj.shape[2] // num_key_heads
    run = functools.partial(_local_attention, group=group, scale=scale, kernel=kernel)
    return shard_kernel(run, (q_b1nj, k, v, jnp.asarray(layer), end_b), out_like=0)


def _local_attention(q_b1nj, k, v, layer, end_b, group, scale, kernel):
    _, _, n, j = q_b1nj.shape
    num_heads = n, n // group
    length, width_v = v["values"].shape[2], v["values"].shape[3] // num_heads[1]
    options = {"num_heads": num_heads, "scale": scale}
    xla = functools.partial(_xla, **options)
    arrays = (q_b1nj, k, v, layer, end_b)
    if kernel is None and (j % LANES or width_v % LANES or length % LANES):
        return xla(*arrays)
    pallas = functools.partial(_pallas, **options)
    if kernel:
        xla = functools.partial(pallas, is_interpreted=True)
    return jax.lax.platform_dependent(*arrays, tpu=pallas, default=xla)


def _xla(q_b1nj, k, v, layer, end_b, num_heads, scale):
    einsum = float32_einsum(q_b1nj.dtype)
    k_bsx, v_bsx = (_read(store, layer, q_b1nj.dtype) for store in (k, v))
    scores_bsn = scale * einsum("bsx,bnx->bsn", k_bsx, _spread_queries(q_b1nj, num_heads))
    mask_bs = jnp.arange(k_bsx.shape[1]) < end_b[:, None]
    p_bsn = jax.nn.softmax(jnp.where(mask_bs[..., None], scores_bsn, MASK_VALUE), axis=1)
    z_bnx = einsum("bsn,bsx->bnx", p_bsn.astype(v_bsx.dtype), v_bsx)
    return _gather_own_heads(z_bnx, num_heads).astype(q_b1nj.dtype)


def _read(store: dict, layer, dtype) -> jax.Array:
    """The keys or values of one layer, dequantized: [B, S, K * width]."""
    part = jax.tree.map(
        lambda array: jax.lax.dynamic_index_in_dim(array, layer, keepdims=False), store
    )
    if "scale" not in part:
        return part["values"].astype(dtype)
    b, s, x = part["values"].shape
    heads = part["values"].reshape(b, s, part["scale"].shape[1], -1)
    return (heads * part["scale"].swapaxes(1, 2)[..., None]).reshape(b, s, x).astype(dtype)


def _spread_queries(q_b1nj: jax.Array, num_heads: tuple[int, int]) -> jax.Array:
    """[B, N, K * J] block-diagonal: each query in the columns of its own key head, else zeros."""
    b, _, n, _ = q_b1nj.shape
    return jnp.where(_is_own_head(num_heads), q_b1nj[:, 0, :, None], 0).reshape(b, n, -1)


def _gather_own_heads(z_bnx: jax.Array, num_heads: tuple[int, int]) -> jax.Array:
    """[B, N, K * H] -> [B, 1, N, H]: the columns of each query's own key head."""
    b, n, _ = z_bnx.shape
    z_bnkh = z_bnx.reshape(b, n, num_heads[1], -1)
    return jnp.sum(jnp.where(_is_own_head(num_heads), z_bnkh, 0), axis=2)[:, None]


def _is_own_head(num_heads: tuple[int, int]) -> jax.Array:
    n, k = num_heads
    return (jnp.arange(n)[:, None] // (n // k) == jnp.arange(k))[..., None]


def _kernel(layer_ref, end_ref, *refs, scale, group):
    *inputs, z_ref, max_ref, sum_ref, acc_ref = refs
    q_ref, k_ref, v_ref, *scales = inputs
    row, number = pl.program_id(0), pl.program_id(1)
    block = k_ref.shape[0]

    @pl.when(number == 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, MASK_VALUE / 2)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(number * block < end_ref[row])
    def _():
        q = q_ref[...]
        scores_ns = scale * dot(q, k_ref[...].astype(q.dtype), NT)
        if scales:
            scores_ns *= _repeat_for_queries(scales[0][...], group)
        key_ns = number * block + jax.lax.broadcasted_iota(jnp.int32, scores_ns.shape, 1)
        scores_ns = jnp.where(key_ns < end_ref[row], scores_ns, MASK_VALUE)
        running_max = jnp.maximum(max_ref[...], jnp.max(scores_ns, axis=1, keepdims=True))
        p_ns = jnp.exp(scores_ns - running_max)
        rescale = jnp.exp(max_ref[...] - running_max)
        max_ref[...] = running_max
        sum_ref[...] = rescale * sum_ref[...] + jnp.sum(p_ns, axis=1, keepdims=True)
        if scales:
            p_ns *= _repeat_for_queries(scales[1][...], group)
        v = v_ref[...].astype(q.dtype)
        acc_ref[...] = rescale * acc_ref[...] + dot(p_ns.astype(q.dtype), v, NN)

    @pl.when(number == pl.num_programs(1) - 1)
    def _():
        z_ref[...] = acc_ref[...] / sum_ref[...]


def _repeat_for_queries(scale_ks: jax.Array, group: int) -> jax.Array:
    """[K, S] -> [N, S]: each query head gets the scale of its own key head."""
    k, s = scale_ks.shape
    return jnp.broadcast_to(scale_ks[:, None], (k, group, s)).reshape(k * group, s)


def _pallas(q_b1nj, k, v, layer, end_b, num_heads, scale, is_interpreted=False):
    q_bnx = _spread_queries(q_b1nj, num_heads)
    k_values, v_values = k["values"], v["values"]
    b, n, width_k = q_bnx.shape
    length, width_v = v_values.shape[2:]
    block = next((size for size in BLOCKS if length % size == 0), length)

    def clamp(number, row, end):
        """Past the row's last block, the last one again, so that nothing more is read."""
        return jnp.minimum(number, (end[row] - 1) // block)

    def row_map(row, number, layer, end):
        return row, 0, 0

    def kv_map(row, number, layer, end):
        return layer[0], row, clamp(number, row, end), 0

    def scale_map(row, number, layer, end):
        return layer[0], row, 0, clamp(number, row, end)

    arrays, specs = [q_bnx, k_values, v_values], [pl.BlockSpec((None, n, width_k), row_map)]
    specs += [pl.BlockSpec((None, None, block, width), kv_map) for width in (width_k, width_v)]
    if "scale" in k:
        arrays += [k["scale"], v["scale"]]
        specs += [pl.BlockSpec((None, None, num_heads[1], block), scale_map)] * 2
    z_bnx = pl.pallas_call(
        functools.partial(_kernel, scale=scale, group=num_heads[0] // num_heads[1]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, length // block),
            in_specs=specs,
            out_specs=pl.BlockSpec((None, n, width_v), row_map),
            scratch_shapes=[
                pltpu.VMEM((n, 1), jnp.float32),
                pltpu.VMEM((n, 1), jnp.float32),
                pltpu.VMEM((n, width_v), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((b, n, width_v), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * b * n * length * (width_k + width_v),
            transcendentals=b * n * length,
            bytes_accessed=b * length * (width_k + width_v) * k_values.dtype.itemsize,
        ),
        name=NAME,
        interpret=is_interpreted,
    )(jnp.asarray(layer, jnp.int32).reshape(1), end_b.astype(jnp.int32), *arrays)
    return _gather_own_heads(z_bnx, num_heads).astype(q_b1nj.dtype)
