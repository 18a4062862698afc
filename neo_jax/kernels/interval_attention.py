"""Attention in which every query sees one interval of keys.

q [B, T, N, J], k [B, S, K, J], v [B, S, K, H] -> [B, T, N, H], with N a multiple of K (grouped
heads) and J and H of any width. Interval bounds are positions along S. The softmax is float32.
Runs under a mesh; batch and heads may be split over it.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

# Queries are taken this many at a time: scores never hold more than [B, N, QUERY_BLOCK, S].
QUERY_BLOCK = 512


def interval_attention(
    q_btnj: jax.Array,
    k_bskj: jax.Array,
    v_bskh: jax.Array,
    start_bt: jax.Array,
    end_bt: jax.Array,
    scale: float,
) -> jax.Array:
    """Softmax attention of each query t over the keys start <= s < end. [B, T, N, H].

    An empty interval gives an average of all values, which is finite; nobody reads it.
    """
    length = q_btnj.shape[1]
    if length <= QUERY_BLOCK:
        return _attend(q_btnj, k_bskj, v_bskh, start_bt, end_bt, scale)
    missing = -length % QUERY_BLOCK

    def blocks(array):
        """[B, T, ...] -> [T / block, B, block, ...], padded at the end."""
        array = jnp.pad(array, [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2))
        array = array.reshape(array.shape[0], -1, QUERY_BLOCK, *array.shape[2:])
        return jnp.moveaxis(array, 1, 0)

    # Scores are computed again in the backward pass rather than kept.
    attend = jax.checkpoint(
        lambda block: _attend(block[0], k_bskj, v_bskh, block[1], block[2], scale)
    )
    z = jax.lax.map(attend, (blocks(q_btnj), blocks(start_bt), blocks(end_bt)))
    z_btnh = jnp.moveaxis(z, 0, 1).reshape(q_btnj.shape[0], -1, *z.shape[3:])
    return z_btnh[:, :length]


def _attend(q_btnj, k_bskj, v_bskh, start_bt, end_bt, scale):
    b, t, n, j = q_btnj.shape
    num_keys, num_kv_heads = k_bskj.shape[1:3]
    precision = jax.lax.Precision.HIGHEST if q_btnj.dtype == jnp.float32 else None
    batch, _, heads, _ = jax.typeof(q_btnj).sharding.spec
    q_btkgj = q_btnj.reshape(
        b, t, num_kv_heads, n // num_kv_heads, j, out_sharding=P(batch, None, heads, None, None)
    )
    scores_bkgts = scale * jnp.einsum(
        "btkgj,bskj->bkgts",
        q_btkgj,
        k_bskj,
        preferred_element_type=jnp.float32,
        precision=precision,
    )
    key_s = jnp.arange(num_keys, dtype=jnp.int32)
    is_seen_bts = (key_s >= start_bt[..., None]) & (key_s < end_bt[..., None])
    scores_bkgts = jnp.where(is_seen_bts[:, None, None], scores_bkgts, -1e30)
    p_bkgts = jax.nn.softmax(scores_bkgts, axis=-1).astype(v_bskh.dtype)
    z_btkgh = jnp.einsum("bkgts,bskh->btkgh", p_bkgts, v_bskh, precision=precision)
    return z_btkgh.reshape(b, t, n, v_bskh.shape[-1], out_sharding=P(batch, None, heads, None))
