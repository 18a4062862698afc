"""Interval attention by blocks of keys, in XLA: for CPUs, GPUs and widths that no kernel takes.

Memory is bounded by the scores of one block. Each block of queries loops only over the blocks of
keys between the first start and the last end of its intervals. The backward pass recomputes the
scores.
"""

import jax
import jax.numpy as jnp

from neo_jax.kernels.dense import MASK_VALUE, float32_einsum

BLOCK = 512


def forward(q_btnj, k_bskj, v_bskh, start_bt, end_bt, scale):
    """The attention output [B, T, N, H], and log(sum(exp(scores))) [B, T, N] float32.

    The latter is 0 where a query sees nothing. T and S may be any numbers.
    """
    einsum, group = float32_einsum(q_btnj.dtype), q_btnj.shape[2] // k_bskj.shape[2]
    k_bskj, v_bskh = _pad(k_bskj, BLOCK), _pad(v_bskh, BLOCK)

    def block(inputs):
        row, q_tnj, start_t, end_t = inputs
        q_tkgj = q_tnj.reshape(len(q_tnj), -1, group, q_tnj.shape[-1])

        def step(number, state):
            running_max, total, z = state
            k_skj, v_skh = (_read_block(array, row, number) for array in (k_bskj, v_bskh))
            scores = scale * einsum("tkgj,skj->kgts", q_tkgj, k_skj)
            scores = jnp.where(_mask(start_t, end_t, number), scores, MASK_VALUE)
            new_max = jnp.maximum(running_max, jnp.max(scores, axis=-1))
            p = jnp.exp(scores - new_max[..., None])
            rescale = jnp.exp(running_max - new_max)
            z = z * rescale[..., None] + einsum("kgts,skh->kgth", p.astype(v_skh.dtype), v_skh)
            return new_max, total * rescale + jnp.sum(p, axis=-1), z

        shape = (q_tkgj.shape[1], group, len(q_tnj))
        # Above MASK_VALUE, so that masked keys get exp(MASK_VALUE - running_max) = 0.
        state = (
            jnp.full(shape, MASK_VALUE / 2),
            jnp.zeros(shape),
            jnp.zeros((*shape, v_bskh.shape[-1])),
        )
        running_max, total, z = jax.lax.fori_loop(*_bounds(start_t, end_t), step, state)
        is_empty = total == 0
        total = jnp.where(is_empty, 1, total)
        z_tkgh = jnp.moveaxis(z / total[..., None], 2, 0)
        log_sum = jnp.where(is_empty, 0, running_max + jnp.log(total))
        return z_tkgh.reshape(len(q_tnj), -1, z.shape[-1]).astype(q_btnj.dtype), _ungroup_heads(
            log_sum
        )

    z, log_sum = jax.lax.map(block, _blocks(q_btnj, start_bt, end_bt))
    b, t = start_bt.shape
    return tuple(array.reshape(b, -1, *array.shape[2:])[:, :t] for array in (z, log_sum))


def backward(q_btnj, k_bskj, v_bskh, start_bt, end_bt, z_btnh, log_sum_btn, dz_btnh, scale):
    """Gradients of q, k and v."""
    einsum, group = float32_einsum(q_btnj.dtype), q_btnj.shape[2] // k_bskj.shape[2]
    num_keys = k_bskj.shape[1]
    k_bskj, v_bskh = _pad(k_bskj, BLOCK), _pad(v_bskh, BLOCK)
    delta_btn = jnp.sum(z_btnh.astype(jnp.float32) * dz_btnh.astype(jnp.float32), axis=-1)

    def block(sums, inputs):
        row, q_tnj, start_t, end_t, dz_tnh, log_sum_tn, delta_tn = inputs
        heads = (len(q_tnj), k_bskj.shape[2], group)
        q_tkgj, dz_tkgh = q_tnj.reshape(*heads, q_tnj.shape[-1]), dz_tnh.reshape(*heads, -1)
        log_sum, delta = (_group_heads(array, group) for array in (log_sum_tn, delta_tn))

        def step(number, state):
            dk_bskj, dv_bskh, dq_tkgj = state
            k_skj, v_skh = (_read_block(array, row, number) for array in (k_bskj, v_bskh))
            scores = scale * einsum("tkgj,skj->kgts", q_tkgj, k_skj)
            mask = _mask(start_t, end_t, number)
            p = jnp.exp(jnp.where(mask, scores - log_sum[..., None], MASK_VALUE))
            dp = einsum("tkgh,skh->kgts", dz_tkgh, v_skh)
            dscores = (scale * p * (dp - delta[..., None])).astype(k_skj.dtype)
            dk = einsum("kgts,tkgj->skj", dscores, q_tkgj)
            dv = einsum("kgts,tkgh->skh", p.astype(v_skh.dtype), dz_tkgh)
            dq_tkgj += einsum("kgts,skj->tkgj", dscores, k_skj)
            return (
                _add_to_block(dk_bskj, dk, row, number),
                _add_to_block(dv_bskh, dv, row, number),
                dq_tkgj,
            )

        *sums, dq_tkgj = jax.lax.fori_loop(
            *_bounds(start_t, end_t), step, (*sums, jnp.zeros(q_tkgj.shape))
        )
        return tuple(sums), dq_tkgj.reshape(q_tnj.shape).astype(q_tnj.dtype)

    zeros = tuple(jnp.zeros(array.shape, jnp.float32) for array in (k_bskj, v_bskh))
    blocks = _blocks(q_btnj, start_bt, end_bt, dz_btnh, log_sum_btn, delta_btn)
    (dk_bskj, dv_bskh), dq = jax.lax.scan(block, zeros, blocks)
    b, t = start_bt.shape
    dq_btnj = dq.reshape(b, -1, *dq.shape[2:])[:, :t]
    dk_bskj, dv_bskh = dk_bskj[:, :num_keys], dv_bskh[:, :num_keys]
    return dq_btnj, dk_bskj.astype(k_bskj.dtype), dv_bskh.astype(v_bskh.dtype)


def _pad(array: jax.Array, multiple: int) -> jax.Array:
    """Pads axis 1 with zeros: keys that no query sees, queries that see nothing."""
    return jnp.pad(array, [(0, 0), (0, -array.shape[1] % multiple)] + [(0, 0)] * (array.ndim - 2))


def _blocks(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The row of each block, and the arrays [B, T, ...] as [B * blocks, block, ...]."""
    b, t = arrays[0].shape[:2]
    size = min(BLOCK, t)
    blocks = [_pad(array, size).reshape(-1, size, *array.shape[2:]) for array in arrays]
    return jnp.repeat(jnp.arange(b), len(blocks[0]) // b), *blocks


def _bounds(start_t: jax.Array, end_t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first block of keys and one past the last; equal if no query sees anything."""
    is_empty = start_t >= end_t
    first = jnp.min(jnp.where(is_empty, jnp.max(end_t), start_t)) // BLOCK
    return first, -(-jnp.max(jnp.where(is_empty, 0, end_t)) // BLOCK)


def _read_block(array: jax.Array, row: jax.Array, number: jax.Array) -> jax.Array:
    index = (row, number * BLOCK, *[0] * (array.ndim - 2))
    return jax.lax.dynamic_slice(array, index, (1, BLOCK, *array.shape[2:]))[0]


def _add_to_block(sums: jax.Array, new: jax.Array, row: jax.Array, number: jax.Array) -> jax.Array:
    new = _read_block(sums, row, number) + new
    return jax.lax.dynamic_update_slice(sums, new[None], (row, number * BLOCK, 0, 0))


def _mask(start_t: jax.Array, end_t: jax.Array, number: jax.Array) -> jax.Array:
    """[T, block] bool: whether each query sees each key of a block of keys."""
    key_s = number * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
    return (key_s >= start_t[:, None]) & (key_s < end_t[:, None])


def _ungroup_heads(array_kgt: jax.Array) -> jax.Array:
    return jnp.moveaxis(array_kgt, 2, 0).reshape(array_kgt.shape[2], -1)


def _group_heads(array_tn: jax.Array, group: int) -> jax.Array:
    return jnp.moveaxis(array_tn.reshape(len(array_tn), -1, group), 0, 2)
