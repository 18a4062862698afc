"""Interval attention by its definition, with all scores in memory: for few keys, and for tests."""

import functools

import jax
import jax.numpy as jnp

MASK_VALUE = -1e30  # the score of a key that a query does not see


def float32_einsum(dtype) -> functools.partial:
    """An einsum that accumulates in float32, for factors of `dtype`.

    Float32 factors stay float32: TPUs and GPUs would otherwise round them first.
    """
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)


def attention(q_btnj, k_bskj, v_bskh, start_bt, end_bt, scale):
    """See `interval_attention`."""
    b, t, n, j = q_btnj.shape
    num_keys, k = k_bskj.shape[1:3]
    einsum = float32_einsum(q_btnj.dtype)
    q_btkgj = q_btnj.reshape(b, t, k, n // k, j)
    scores_bkgts = scale * einsum("btkgj,bskj->bkgts", q_btkgj, k_bskj)
    mask_bts = interval_mask(start_bt, end_bt, num_keys)
    scores_bkgts = jnp.where(mask_bts[:, None, None], scores_bkgts, MASK_VALUE)
    p_bkgts = jax.nn.softmax(scores_bkgts, axis=-1).astype(v_bskh.dtype)
    z_btkgh = einsum("bkgts,bskh->btkgh", p_bkgts, v_bskh)
    z_btnh = z_btkgh.reshape(b, t, n, -1)
    sees_any_bt = (start_bt < end_bt)[..., None, None]
    return jnp.where(sees_any_bt, z_btnh, 0).astype(q_btnj.dtype)


def interval_mask(start_bt: jax.Array, end_bt: jax.Array, num_keys: int) -> jax.Array:
    """[B, T, S] bool: whether the query sees the key."""
    key_s = jnp.arange(num_keys, dtype=jnp.int32)
    return (key_s >= start_bt[..., None]) & (key_s < end_bt[..., None])
