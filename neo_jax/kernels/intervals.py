"""NEO's attention rule as one interval of keys per query.

A token sees every token of its document that is not later on the T axis. An image has a single
T, so it sees itself in full. Documents and images are contiguous, hence the keys that a query
sees are contiguous too: [start, end).

    token      a  b  <img>  i  i  i  </img>  c | d  e      (| starts a second document)
    T          0  1   2     3  3  3   4      5 | 0  1
    start      0  0   0     0  0  0   0      0 | 8  8
    end        1  2   3     6  6  6   7      8 | 9 10
"""

import jax
import jax.numpy as jnp


def intervals(t_bt: jax.Array, segments_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First key and one past the last key that each token sees.

    Args:
      t_bt: [B, T] int, T axis position; never falls inside a document.
      segments_bt: [B, T] int, document of each token, 0 for padding.

    Returns:
      start_bt, end_bt: [B, T] int32. Both never fall along a row, but for padding, which sees
      only itself.
    """
    length = t_bt.shape[1]
    index_t = jnp.arange(length, dtype=jnp.int32)
    new_document = segments_bt[:, 1:] != segments_bt[:, :-1]
    new_run = new_document | (t_bt[:, 1:] != t_bt[:, :-1])
    first_bt = jnp.pad(new_document, [(0, 0), (1, 0)], constant_values=True)
    last_bt = jnp.pad(new_run, [(0, 0), (0, 1)], constant_values=True)
    start_bt = jax.lax.cummax(jnp.where(first_bt, index_t, 0), axis=1)
    end_bt = jax.lax.cummin(jnp.where(last_bt, index_t + 1, length), axis=1, reverse=True)
    is_padding = segments_bt == 0
    return jnp.where(is_padding, index_t, start_bt), jnp.where(is_padding, index_t + 1, end_bt)
