"""The key-value cache: fixed-shape arrays, a row per running request.

A cache is a dict. `pre_buffer` and `post_llm` hold the keys [l, B, S, K, J] and values
[l, B, S, K, H] of their l layers; `length_b` says how many places of each row are taken, and
`t_b` is the T position of the row's next token. Rows fill from the left without gaps, so what a
new token sees is the interval [0, length], and the attention rule of training serves unchanged.
"""

from typing import Any

import jax
import jax.numpy as jnp

Cache = dict[str, Any]

STACKS = ("pre_buffer", "post_llm")


def grow(cache: Cache, length: int) -> Cache:
    """The same cache with room for `length` tokens in each row."""

    def pad(kv_lbs):
        missing = length - kv_lbs.shape[2]
        return jnp.pad(kv_lbs, [(0, 0), (0, 0), (0, missing), (0, 0), (0, 0)])

    return cache | {name: jax.tree.map(pad, cache[name]) for name in STACKS if name in cache}


def write(kv_lbs: jax.Array, new_bt: jax.Array, layer: jax.Array, position_b: jax.Array):
    """Puts [B, T, ...] keys or values into one layer of [l, B, S, ...], from each row's position.

    A scatter into the stacked array, so that a scan over layers updates it in place.
    """

    def write_row(row_ls, new_t, position):
        return jax.lax.dynamic_update_slice(
            row_ls, new_t[None].astype(row_ls.dtype), (layer, position, 0, 0)
        )

    return jax.vmap(write_row, in_axes=(1, 0, 0), out_axes=1)(kv_lbs, new_bt, position_b)


def read(kv_lbs: jax.Array, layer: jax.Array) -> jax.Array:
    """[B, S, ...] keys or values of one layer."""
    return jax.lax.dynamic_index_in_dim(kv_lbs, layer, axis=0, keepdims=False)
