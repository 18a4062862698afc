"""The block list: which blocks of keys each block of queries attends to.

An attention kernel walks this list. It is the sparse form of the block mask, whose blocks are

    .  empty     no query sees a key: not in the list, so neither read nor computed
    p  partial   the kernel masks the scores
    f  full      every query sees every key: no mask is needed

    block mask       keys 0 1 2      q-major list                    kv-major list
    queries 0             p . .      (0,0)                           (0,0) (1,0) (2,0)
            1             f p .      (1,0) (1,1)                     (1,1) (2,1)
            2             f f p      (2,0) (2,1) (2,2)               (2,2)

A block of queries attends to the blocks between the first start and the last end of its intervals,
so the work grows with the intervals' lengths and not with the square of the sequence's.

An entry is one int32: the block of queries, counted over all rows of the batch (15 bits), the block
of keys (13 bits) and three flags.
"""

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax.errors import InputError

FIRST = 1  # entry of its block of queries (in a kv-major list: of keys)
LAST = 2
PARTIAL = 4
_FLAG_BITS, _KEY_BITS = 3, 13
MAX_KEY_BLOCKS, MAX_QUERY_BLOCKS = 1 << _KEY_BITS, 1 << (32 - _KEY_BITS - _FLAG_BITS - 1)


def block_mask(start_bt, end_bt, num_keys: int, block_q: int, block_k: int, xp=jnp):
    """Which blocks are not empty, and which are full.

    Args:
      start_bt, end_bt: [B, T], T a multiple of `block_q`; start >= end where nothing is seen.
      num_keys: a multiple of `block_k`.
      xp: jax.numpy, or numpy to count on the host.

    Returns:
      is_listed, is_full: [B, T / block_q, S / block_k] bool.
    """
    blocks = (start_bt.shape[0], -1, block_q)
    start, end = start_bt.reshape(blocks), end_bt.reshape(blocks)
    is_empty = start >= end
    low = xp.min(xp.where(is_empty, num_keys, start), axis=2)[..., None]
    high = xp.max(xp.where(is_empty, 0, end), axis=2)[..., None]
    first_key = xp.arange(0, num_keys, block_k)
    is_listed = (low < first_key + block_k) & (high > first_key)
    latest, earliest = xp.max(start, axis=2)[..., None], xp.min(end, axis=2)[..., None]
    return is_listed, (latest <= first_key) & (earliest >= first_key + block_k)


def count(start_bt, end_bt, num_keys: int, block_q: int, block_k: int) -> int:
    """Number of blocks that are not empty; on the host."""
    bounds = np.asarray(start_bt), np.asarray(end_bt)
    return int(block_mask(*bounds, num_keys, block_q, block_k, np)[0].sum())


def q_major(start_bt, end_bt, num_keys: int, block_q: int, block_k: int):
    """The block list ordered by queries, with at least one entry for each block of queries.

    Returns:
      entries [B * blocks * blocks] int32, and the number of those that are valid [1] int32.
    """
    is_listed, is_full = block_mask(start_bt, end_bt, num_keys, block_q, block_k)
    # Queries that see nothing still need an entry, in which the kernel writes their zeros.
    is_listed = is_listed.at[..., 0].set(is_listed[..., 0] | ~jnp.any(is_listed, axis=2))
    return _make_list(is_listed, is_full, query_axis=1)


def kv_major(start_bt, end_bt, num_keys: int, block_q: int, block_k: int):
    """The same ordered by rows, then keys, with at least one entry for each block of keys."""
    is_listed, is_full = block_mask(start_bt, end_bt, num_keys, block_q, block_k)
    is_listed = is_listed.at[:, 0].set(is_listed[:, 0] | ~jnp.any(is_listed, axis=1))
    return _make_list(is_listed.swapaxes(1, 2), is_full.swapaxes(1, 2), query_axis=2)


def _make_list(is_listed: jax.Array, is_full: jax.Array, query_axis: int):
    b = is_listed.shape[0]
    num_queries = is_listed.shape[query_axis]
    if b * num_queries > MAX_QUERY_BLOCKS or is_listed.shape[3 - query_axis] > MAX_KEY_BLOCKS:
        raise InputError(
            f"attention of {is_listed.shape} blocks is too much for one device: use fewer rows, "
            "or split them over context"
        )
    order = jnp.cumsum(is_listed, axis=2)
    is_first = is_listed & (order == 1)
    is_last = is_listed & (order == order[..., -1:])
    index = [jnp.arange(size, dtype=jnp.int32) for size in is_listed.shape]
    row, outer, inner = jnp.meshgrid(*index, indexing="ij")
    query, key = (outer, inner) if query_axis == 1 else (inner, outer)
    flags = FIRST * is_first + LAST * is_last + PARTIAL * ~is_full
    entry = (row * num_queries + query) << (_KEY_BITS + _FLAG_BITS) | key << _FLAG_BITS | flags
    # A sort, because XLA would run a gather this small on the SparseCores of newer TPUs.
    _, entry = jax.lax.sort((~is_listed.reshape(-1), entry.reshape(-1)), num_keys=1)
    return entry, jnp.sum(is_listed, dtype=jnp.int32)[None]


def query_block(entry):
    """The block of queries of an entry, counted over all rows of the batch."""
    return entry >> (_KEY_BITS + _FLAG_BITS)


def key_block(entry):
    """The block of keys of an entry, within its row."""
    return (entry >> _FLAG_BITS) & (MAX_KEY_BLOCKS - 1)
