"""Attention in prefill: rows of a fixed number of tokens, each a part of one prompt.

The rows of a prompt follow one another. So several short prompts, or a chunk of a long one, have
the same few shapes:

    row 0    prompt A, tokens 0..T        row 2    prompt B, tokens 0..T, padding
    row 1    prompt A, tokens T..2T       row 3    padding
"""

import functools

import jax
import jax.numpy as jnp

from neo_jax.kernels.interval_attention import interval_attention
from neo_jax.model import kv_cache as kv
from neo_jax.sharding import AXES, spec

_HEADS, _ROWS = spec("batch", None, "heads", None), spec("batch", None)


def key_sizes(rows: int, length: int) -> list[int]:
    """The numbers of keys that `attend_rows` is compiled for; a row takes the smallest it needs.

    Args:
      rows: number of rows of the prefill.
      length: tokens of a row.
    """
    return sorted({min(length << power, rows * length) for power in range(rows.bit_length() + 1)})


def attend_rows(
    q_rtnj: jax.Array,
    k_rtkj: jax.Array,
    v_rtkh: jax.Array,
    start_r: jax.Array,
    end_rt: jax.Array,
    scale: float,
) -> jax.Array:
    """Attention of prompts that start in these rows, so that the cache is not read: [R, T, N, H].

    Args:
      start_r: [R] position in its prompt of the row's first token.
      end_rt: [R, T] the token sees its prompt up to this position; 0 for padding.
    """

    def local(q_rtnj, k_rtkj, v_rtkh, start_r, end_rt):
        count, length = end_rt.shape
        total, sizes = count * length, key_sizes(count, length)
        keys, values = (array.reshape(total, *array.shape[2:]) for array in (k_rtkj, v_rtkh))

        def attend(row):
            """Attention of one row over the rows of its prompt, as many as it needs."""
            q_tnj, first, end_t = row

            def attend_to(size):
                begin = jnp.minimum(first, total - size)
                k_1skj, v_1skh = (
                    jax.lax.dynamic_slice_in_dim(array, begin, size)[None]
                    for array in (keys, values)
                )
                first_1t = jnp.broadcast_to(first - begin, (1, length))
                end_1t = first_1t + end_t
                return interval_attention(q_tnj[None], k_1skj, v_1skh, first_1t, end_1t, scale)[0]

            choice = jnp.sum(jnp.array(sizes) < jnp.max(end_t))
            return jax.lax.switch(choice, [functools.partial(attend_to, size) for size in sizes])

        first_r = length * jnp.arange(count) - start_r
        return jax.lax.map(attend, (q_rtnj, first_r, end_rt))

    in_specs = (_HEADS, _HEADS, _HEADS, spec("batch"), _ROWS)
    run = jax.shard_map(local, in_specs=in_specs, out_specs=_HEADS, check_vma=False)
    return run(q_rtnj, k_rtkj, v_rtkh, start_r, end_rt)


def attend_slots(
    q_rtnj: jax.Array,
    store: dict[str, kv.Store],
    layer: jax.Array,
    slot_r: jax.Array,
    end_rt: jax.Array,
    num_key_heads: int,
    scale: float,
) -> jax.Array:
    """Attention of prompts that continue: a token sees its slot from 0 to `end_rt`: [R, T, N, H].

    Rows run one by one, so that no more than one slot's keys are copied at a time.
    """

    def local(q_rtnj, store, layer, slot_r, end_rt):
        def attend(row):
            q_tnj, slot, end_t = row
            k_1skj, v_1skh = (
                kv.read_slot(store[which], layer, slot, num_heads, q_rtnj.dtype)
                for which in ("k", "v")
            )
            end_1t = end_t[None]
            return interval_attention(q_tnj[None], k_1skj, v_1skh, 0 * end_1t, end_1t, scale)[0]

        return jax.lax.map(attend, (q_rtnj, slot_r, end_rt))

    num_heads = num_key_heads // jax.sharding.get_abstract_mesh().shape[AXES["heads"]]
    in_specs = (_HEADS, kv.partition(store), spec(), spec("batch"), _ROWS)
    run = jax.shard_map(local, in_specs=in_specs, out_specs=_HEADS, check_vma=False)
    return run(q_rtnj, store, layer, slot_r, end_rt)
