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

from neo_jax.kernels import pallas_decode
from neo_jax.kernels.dense import MASK_VALUE, float32_einsum
from neo_jax.kernels.shard_kernel import shard_kernel

LANES = 128
TOKENS = 512  # of a lane that XLA reads at once
CPU_LANES = 2  # that a CPU reads at once, so that they stay in its cache
MIN_SLICES = 16  # of fewer blocks of two lanes XLA makes one slow loop on a CPU


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
    xla, pallas = functools.partial(_xla, **options), functools.partial(_pallas, **options)
    on_cpu = functools.partial(xla, lanes=CPU_LANES)
    arrays = (q_b1nj, k, v, layer, block_table_bn, end_b)
    if kernel:
        return jax.lax.platform_dependent(
            *arrays, tpu=pallas, default=functools.partial(pallas, is_interpreted=True)
        )
    if j % LANES or width_v % LANES or size % LANES:
        pallas = xla
    return jax.lax.platform_dependent(*arrays, tpu=pallas, cpu=on_cpu, default=xla)


def _pallas(q_b1nj, k, v, layer, block_table_bn, end_b, num_heads, scale, **options):
    q_bnx = _spread_queries(q_b1nj, num_heads)
    arrays = (q_bnx, k, v, layer, block_table_bn, end_b)
    z_bnx = pallas_decode.forward(*arrays, num_heads, scale, **options)
    return _gather_own_heads(z_bnx, num_heads).astype(q_b1nj.dtype)


def _xla(q_b1nj, k, v, layer, block_table_bn, end_b, num_heads, scale, lanes=None):
    """Some blocks of `lanes` lanes at a time (None: of all), as many times as the longest needs."""
    q_bnx, size = _spread_queries(q_b1nj, num_heads), k["values"].shape[2]
    many = max(1, min(TOKENS // size, block_table_bn.shape[1]))
    table_bn = jnp.pad(block_table_bn, [(0, 0), (0, -block_table_bn.shape[1] % many)])
    take = _side_by_side if lanes else _gathered

    def read(store, blocks_bm):
        parts = {which: take(array, layer, blocks_bm) for which, array in store.items()}
        return _dequantized(parts, q_b1nj.dtype)

    def group(inputs):
        q_bnx, table_bn, end_b = inputs

        def step(number, state):
            blocks_bm = jax.lax.dynamic_slice_in_dim(table_bn, number * many, many, axis=1)
            key_s = number * many * size + jnp.arange(many * size)
            mask_bs1 = (key_s < end_b[:, None])[..., None]
            return _online_softmax(
                state, q_bnx, read(k, blocks_bm), read(v, blocks_bm), mask_bs1, scale
            )

        b, n, _ = q_bnx.shape
        # Above every score of an unseen key, so that its exponent is 0 from the first.
        state = jnp.full((b, n), MASK_VALUE / 2), jnp.zeros((b, n))
        state += (jnp.zeros((b, n, v["values"].shape[3])),)
        steps = -(-jnp.max(end_b) // (many * size))
        _, total, z_bnx = jax.lax.fori_loop(0, steps, step, state)
        return z_bnx / jnp.where(total == 0, 1, total)[..., None]

    b = len(q_bnx)
    if lanes and (b % lanes or lanes * many < MIN_SLICES):
        lanes = 1
    lanes = lanes or b
    arrays = (q_bnx, table_bn, end_b)
    z_bnx = jax.lax.map(
        group, jax.tree.map(lambda array: array.reshape(-1, lanes, *array.shape[1:]), arrays)
    ).reshape(b, q_bnx.shape[1], -1)
    return _gather_own_heads(z_bnx, num_heads).astype(q_b1nj.dtype)


def _online_softmax(state, q_bnx, k_bsx, v_bsx, mask_bs1, scale):
    einsum, (running_max, total, z_bnx) = float32_einsum(q_bnx.dtype), state
    scores_bsn = scale * einsum("bsx,bnx->bsn", k_bsx, q_bnx)
    scores_bsn = jnp.where(mask_bs1, scores_bsn, MASK_VALUE)
    new_max = jnp.maximum(running_max, jnp.max(scores_bsn, axis=1))
    p_bsn, rescale = jnp.exp(scores_bsn - new_max[:, None]), jnp.exp(running_max - new_max)
    z_bnx = rescale[..., None] * z_bnx
    z_bnx += einsum("bsn,bsx->bnx", p_bsn.astype(v_bsx.dtype), v_bsx)
    return new_max, rescale * total + jnp.sum(p_bsn, axis=1), z_bnx


def _gathered(array, layer, blocks_bm):
    """[B, m, ...] of one layer's blocks [B, m]."""
    return array.at[layer, blocks_bm].get(mode="promise_in_bounds")


def _side_by_side(array, layer, blocks_bm):
    """The same for a CPU, which copies slices much faster than it gathers."""

    def block(number):
        return jax.lax.dynamic_slice(array, (layer, number, 0, 0), (1, 1, *array.shape[2:]))[0, 0]

    rows = [jnp.concatenate([block(number) for number in row]) for row in blocks_bm]
    return jnp.stack(rows).reshape(*blocks_bm.shape, *array.shape[2:])


def _dequantized(parts: dict, dtype) -> jax.Array:
    """[B, m * block_size, K * width] of blocks' values [B, m, block_size, K * width]."""
    b, m, size, x = parts["values"].shape
    if "scale" not in parts:
        return parts["values"].astype(dtype).reshape(b, m * size, x)
    heads = parts["values"].reshape(b, m, size, parts["scale"].shape[2], -1)
    return (heads * parts["scale"].swapaxes(2, 3)[..., None]).reshape(b, m * size, x).astype(dtype)


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
