"""Attention of one query per row over a long cache, as in decoding. Runs on a device's part."""

import functools

import jax
import jax.numpy as jnp

from neo_jax.kernels.dense import UNSEEN, product, seen


def attend_one(q_b1nj, k_bskj, v_bskh, start_b1, end_b1, scale):
    """See `interval_attention`. q [B, 1, N, J] -> [B, 1, N, H]."""
    return jax.lax.platform_dependent(
        q_b1nj,
        k_bskj,
        v_bskh,
        start_b1,
        end_b1,
        tpu=functools.partial(_by_sums, scale=scale),
        default=functools.partial(_by_dots, scale=scale),
    )


def _by_sums(q_b1nj, k_bskj, v_bskh, start_b1, end_b1, scale):
    """On a TPU: products and sums over keys where they lie.

    A dot would have it lay out the whole cache anew, with heads before time, at every token.
    """
    b, _, n, j = q_b1nj.shape
    k = k_bskj.shape[2]
    q_b1kgj = q_b1nj.reshape(b, 1, k, n // k, j).astype(jnp.float32)
    k_bskj, v_bskh = k_bskj.astype(jnp.float32), v_bskh.astype(jnp.float32)
    groups = range(n // k)  # one by one: XLA would write the broadcast keys down
    scores_bskg = jnp.stack([jnp.sum(q_b1kgj[..., g, :] * k_bskj, axis=-1) for g in groups], -1)
    is_seen_bs = seen(start_b1, end_b1, k_bskj.shape[1])[:, 0]
    scores_bskg = jnp.where(is_seen_bs[..., None, None], scale * scores_bskg, UNSEEN)
    p_bskg = jax.nn.softmax(scores_bskg, axis=1)
    z_bkgh = jnp.stack([jnp.sum(p_bskg[..., g, None] * v_bskh, axis=1) for g in groups], 2)
    return z_bkgh.reshape(b, 1, n, -1).astype(q_b1nj.dtype)


def _by_dots(q_b1nj, k_bskj, v_bskh, start_b1, end_b1, scale):
    """Elsewhere: two products per row, with all its heads' keys and values.

    They lie together, so they are read once and never moved, as a product for each head would have
    it. Each query is put among zeros in the other heads' places, and each result is taken from its
    own head's: more operations, but reading the cache takes longer.
    """
    dot = product(q_b1nj.dtype)
    b, _, n, j = q_b1nj.shape
    num_keys, k, h = v_bskh.shape[1:]
    is_own_nk = jnp.arange(n)[:, None] // (n // k) == jnp.arange(k)
    q_bnkj = jnp.where(is_own_nk[..., None], q_b1nj[:, 0, :, None], 0)
    scores_bsn = scale * dot(
        "bsx,bnx->bsn", k_bskj.reshape(b, num_keys, k * j), q_bnkj.reshape(b, n, k * j)
    )
    is_seen_bs = seen(start_b1, end_b1, num_keys)[:, 0]
    p_bsn = jax.nn.softmax(jnp.where(is_seen_bs[..., None], scores_bsn, UNSEEN), axis=1)
    z_bnx = dot("bsn,bsx->bnx", p_bsn.astype(v_bskh.dtype), v_bskh.reshape(b, num_keys, k * h))
    z_bnkh = jnp.where(is_own_nk[..., None], z_bnx.reshape(b, n, k, h), 0)
    return jnp.sum(z_bnkh, axis=2)[:, None].astype(q_b1nj.dtype)
