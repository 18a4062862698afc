"""NEO's attention mask as one interval of keys per query.

A token sees every token of its document that is not later on the T axis. All tokens of an image
have the same T, so an image sees itself in full. Documents and images are contiguous, hence the
keys that a query sees are contiguous too: [start, end).

Two documents in a row, the first with an image, and padding. Rows are queries, columns are keys; a
1 is a key that the query sees.

             key  a  <  i  i  i  >  b  c  -  -     < and > begin and end the image i i i,
         segment  1  1  1  1  1  1  2  2  0  0     - is padding
               T  0  1  2  2  2  3  0  1  0  0
                                                   start  end
    query      a  1  .  .  .  .  .  .  .  .  .         0    1
               <  1  1  .  .  .  .  .  .  .  .         0    2
               i  1  1  1  1  1  .  .  .  .  .         0    5
               i  1  1  1  1  1  .  .  .  .  .         0    5
               i  1  1  1  1  1  .  .  .  .  .         0    5
               >  1  1  1  1  1  1  .  .  .  .         0    6
               b  .  .  .  .  .  .  1  .  .  .         6    7
               c  .  .  .  .  .  .  1  1  .  .         6    8
               -  .  .  .  .  .  .  .  .  1  .         8    9
               -  .  .  .  .  .  .  .  .  .  1         9   10
"""

import jax
import jax.numpy as jnp


def intervals(t_bt: jax.Array, segments_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first key that each token sees, and one past the last.

    Args:
      t_bt: [B, T] int, position on the T axis; does not decrease inside a document.
      segments_bt: [B, T] int, number of each token's document, 0 for padding.

    Returns:
      start_bt, end_bt: [B, T] int32. Neither decreases along a row. Padding sees only itself.
    """
    length = t_bt.shape[1]
    index_t = jnp.arange(length, dtype=jnp.int32)
    is_new_document = segments_bt[:, 1:] != segments_bt[:, :-1]
    is_new_t = is_new_document | (t_bt[:, 1:] != t_bt[:, :-1])
    is_first_bt = jnp.pad(is_new_document, [(0, 0), (1, 0)], constant_values=True)
    is_last_bt = jnp.pad(is_new_t, [(0, 0), (0, 1)], constant_values=True)
    start_bt = jax.lax.cummax(jnp.where(is_first_bt, index_t, 0), axis=1)
    end_bt = jax.lax.cummin(jnp.where(is_last_bt, index_t + 1, length), axis=1, reverse=True)
    is_padding = segments_bt == 0
    return jnp.where(is_padding, index_t, start_bt), jnp.where(is_padding, index_t + 1, end_bt)
