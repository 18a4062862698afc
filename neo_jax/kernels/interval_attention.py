"""Attention in which every query sees one interval of keys.

q [B, T, N, J], k [B, S, K, J], v [B, S, K, H] -> [B, T, N, H], with N a multiple of K (grouped
heads) and J and H of any width. Interval bounds are positions along S. The softmax is float32.
Runs under a mesh; batch and heads may be split over it.
"""

import functools

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
    if length == 1:
        arrays = (q_btnj, k_bskj, v_bskh, start_bt, end_bt)
        return jax.lax.platform_dependent(
            *arrays,
            tpu=functools.partial(_attend_one, scale=scale),
            default=functools.partial(_attend_one_by_dots, scale=scale),
        )
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


def _attend_one(q_b1nj, k_bskj, v_bskh, start_b1, end_b1, scale):
    """One query per row on a TPU, as in decoding: products and sums over keys where they lie.

    A dot would have it lay out the whole cache anew, with heads before time, at every token.
    """
    b, _, n, j = q_b1nj.shape
    num_keys, num_kv_heads = k_bskj.shape[1:3]
    batch, _, heads, _ = jax.typeof(q_b1nj).sharding.spec
    grouped = P(batch, None, heads, None, None)
    q_b1kgj = q_b1nj.reshape(b, 1, num_kv_heads, n // num_kv_heads, j, out_sharding=grouped).astype(
        jnp.float32
    )
    k_bskj, v_bskh = k_bskj.astype(jnp.float32), v_bskh.astype(jnp.float32)
    groups = range(n // num_kv_heads)  # one by one: XLA would write the broadcast keys down
    scores_bskg = jnp.stack([jnp.sum(q_b1kgj[..., g, :] * k_bskj, axis=-1) for g in groups], -1)
    key_s = jnp.arange(num_keys, dtype=jnp.int32)
    is_seen_bs = (key_s >= start_b1) & (key_s < end_b1)
    scores_bskg = jnp.where(is_seen_bs[..., None, None], scale * scores_bskg, -1e30)
    p_bskg = jax.nn.softmax(scores_bskg, axis=1)
    z_bkgh = jnp.stack([jnp.sum(p_bskg[..., g, None] * v_bskh, axis=1) for g in groups], 2)
    z_b1nh = z_bkgh.reshape(b, 1, n, -1, out_sharding=P(batch, None, heads, None))
    return z_b1nh.astype(q_b1nj.dtype)


def _attend_one_by_dots(q_b1nj, k_bskj, v_bskh, start_b1, end_b1, scale):
    """One query per row elsewhere: two products per row, with all its heads' keys and values.

    They lie together, so they are read once and never moved, as a product for each head would have
    it. Each query is put among zeros in the other heads' places, and each result is taken from its
    own head's: more operations, but reading the cache takes longer.
    """
    precision = jax.lax.Precision.HIGHEST if q_b1nj.dtype == jnp.float32 else None

    def local(q_b1nj, k_bskj, v_bskh, start_b1, end_b1):
        b, _, n, j = q_b1nj.shape
        num_keys, k, h = v_bskh.shape[1:]
        product = functools.partial(
            jnp.einsum, precision=precision, preferred_element_type=jnp.float32
        )
        is_own_nk = jnp.arange(n)[:, None] // (n // k) == jnp.arange(k)
        q_bnkj = jnp.where(is_own_nk[..., None], q_b1nj[:, 0, :, None], 0)
        scores_bsn = scale * product(
            "bsx,bnx->bsn", k_bskj.reshape(b, num_keys, k * j), q_bnkj.reshape(b, n, k * j)
        )
        key_s = jnp.arange(num_keys, dtype=jnp.int32)
        is_seen_bs = (key_s >= start_b1) & (key_s < end_b1)
        p_bsn = jax.nn.softmax(jnp.where(is_seen_bs[..., None], scores_bsn, -1e30), axis=1)
        z_bnx = product(
            "bsn,bsx->bnx", p_bsn.astype(v_bskh.dtype), v_bskh.reshape(b, num_keys, k * h)
        )
        z_bnkh = jnp.where(is_own_nk[..., None], z_bnx.reshape(b, n, k, h), 0)
        return jnp.sum(z_bnkh, axis=2)[:, None].astype(q_b1nj.dtype)

    batch, _, heads, _ = jax.typeof(q_b1nj).sharding.spec
    split, bounds = P(batch, None, heads, None), P(batch, None)
    run = jax.shard_map(local, in_specs=(split, split, split, bounds, bounds), out_specs=split)
    return run(q_b1nj, k_bskj, v_bskh, start_b1, end_b1)
