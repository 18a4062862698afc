"""Which blocks of keys a block of queries has to visit, as a list that a kernel walks.

The keys that a block of queries sees lie between the first start and the last end of its
intervals. Blocks outside are neither read nor computed, so the work grows with the intervals'
lengths and not with the square of the sequence's.

A visit is one int32: the block of queries, counted over all rows (15 bits), the block of keys (13)
and three flags.
"""

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax.errors import InputError

FIRST = 1  # of its block of queries (of keys, in a list by keys)
LAST = 2
PARTLY = 4  # some query of the block does not see some key of the other
_FLAG_BITS, _KEY_BITS = 3, 13
MAX_KEY_BLOCKS, MAX_QUERY_BLOCKS = 1 << _KEY_BITS, 1 << (32 - _KEY_BITS - _FLAG_BITS - 1)


def visited(start_bt, end_bt, num_keys: int, block_q: int, block_k: int, xp=jnp):
    """Which pairs of blocks have anything to see, and which of them in full.

    Args:
      start_bt, end_bt: [B, T], T a multiple of `block_q`; start >= end where nothing is seen.
      num_keys: a multiple of `block_k`.
      xp: jax.numpy, or numpy to count on the host.

    Returns:
      is_visited, is_full: [B, T / block_q, S / block_k] bool.
    """
    blocks = (start_bt.shape[0], -1, block_q)
    start, end = start_bt.reshape(blocks), end_bt.reshape(blocks)
    is_empty = start >= end
    low = xp.min(xp.where(is_empty, num_keys, start), axis=2)[..., None]
    high = xp.max(xp.where(is_empty, 0, end), axis=2)[..., None]
    first_key = xp.arange(0, num_keys, block_k)
    is_visited = (low < first_key + block_k) & (high > first_key)
    latest, earliest = xp.max(start, axis=2)[..., None], xp.min(end, axis=2)[..., None]
    return is_visited, (latest <= first_key) & (earliest >= first_key + block_k)


def count(start_bt, end_bt, num_keys: int, block_q: int, block_k: int) -> int:
    """How many pairs of blocks a kernel visits; on the host."""
    bounds = np.asarray(start_bt), np.asarray(end_bt)
    return int(visited(*bounds, num_keys, block_q, block_k, np)[0].sum())


def q_major(start_bt, end_bt, num_keys: int, block_q: int, block_k: int):
    """The visits in the order of queries, each block of queries at least once.

    Returns:
      visits: [B * blocks * blocks] int32, and [1] int32: how many of them count.
    """
    is_visited, is_full = visited(start_bt, end_bt, num_keys, block_q, block_k)
    # A block that sees nothing still has to write its zeros.
    is_visited = is_visited.at[..., 0].set(is_visited[..., 0] | ~jnp.any(is_visited, axis=2))
    return _listed(is_visited, is_full, query_axis=1)


def kv_major(start_bt, end_bt, num_keys: int, block_q: int, block_k: int):
    """The same in the order of keys, within a row; each block of keys at least once."""
    is_visited, is_full = visited(start_bt, end_bt, num_keys, block_q, block_k)
    is_visited = is_visited.at[:, 0].set(is_visited[:, 0] | ~jnp.any(is_visited, axis=1))
    return _listed(is_visited.swapaxes(1, 2), is_full.swapaxes(1, 2), query_axis=2)


def _listed(is_visited: jax.Array, is_full: jax.Array, query_axis: int):
    b = is_visited.shape[0]
    num_queries = is_visited.shape[query_axis]
    if b * num_queries > MAX_QUERY_BLOCKS or is_visited.shape[3 - query_axis] > MAX_KEY_BLOCKS:
        raise InputError(
            f"attention of {is_visited.shape} blocks is too much for one device: use fewer rows, "
            "or split them over context"
        )
    order = jnp.cumsum(is_visited, axis=2)
    is_first = is_visited & (order == 1)
    is_last = is_visited & (order == order[..., -1:])
    index = [jnp.arange(size, dtype=jnp.int32) for size in is_visited.shape]
    row, outer, within = jnp.meshgrid(*index, indexing="ij")
    query, key = (outer, within) if query_axis == 1 else (within, outer)
    flags = FIRST * is_first + LAST * is_last + PARTLY * ~is_full
    visit = (row * num_queries + query) << (_KEY_BITS + _FLAG_BITS) | key << _FLAG_BITS | flags
    # Sorted, since newer TPUs would do a gather on their sparse cores, for so little.
    _, visit = jax.lax.sort((~is_visited.reshape(-1), visit.reshape(-1)), num_keys=1)
    return visit, jnp.sum(is_visited, dtype=jnp.int32)[None]


def query_block(visit):
    return visit >> (_KEY_BITS + _FLAG_BITS)


def key_block(visit):
    return (visit >> _FLAG_BITS) & (MAX_KEY_BLOCKS - 1)
