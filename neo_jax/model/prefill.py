"""Attention while prompts are put into the cache, row by row of a fixed number of tokens.

A row holds a part of one prompt; the rows of a prompt follow one another. So several short prompts,
or a part of a long one, fill the same few shapes.
"""

import functools

import jax
import jax.numpy as jnp

from neo_jax.kernels.interval_attention import interval_attention
from neo_jax.model import kv_cache as kv
from neo_jax.sharding import AXES, spec

_HEADS, _ROWS = spec("batch", None, "heads", None), spec("batch", None)


def key_sizes(rows: int, length: int) -> list[int]:
    """Over how many keys a row can attend, among so many rows: as few as it needs are taken."""
    return sorted({min(length << power, rows * length) for power in range(rows.bit_length() + 1)})


def attend_rows(
    q_rtnj: jax.Array,
    k_rtkj: jax.Array,
    v_rtkh: jax.Array,
    start_r: jax.Array,
    end_rt: jax.Array,
    scale: float,
) -> jax.Array:
    """For prompts that begin in these rows: nothing of the cache is read. [R, T, N, H].

    Args:
      start_r: [R] where in its prompt the row begins.
      end_rt: [R, T] the token sees its prompt up to here; 0 for padding.
    """

    def local(q_rtnj, k_rtkj, v_rtkh, start_r, end_rt):
        count, length = end_rt.shape
        total, sizes = count * length, key_sizes(count, length)
        keys, values = (array.reshape(total, *array.shape[2:]) for array in (k_rtkj, v_rtkh))

        def attend(row):
            """A row's queries over as many of its prompt's rows as they need."""
            q_tnj, first, end_t = row

            def over(size):
                begin = jnp.minimum(first, total - size)
                k_1skj, v_1skh = (
                    jax.lax.dynamic_slice_in_dim(array, begin, size)[None]
                    for array in (keys, values)
                )
                first_1t = jnp.broadcast_to(first - begin, (1, length))
                end_1t = first_1t + end_t
                return interval_attention(q_tnj[None], k_1skj, v_1skh, first_1t, end_1t, scale)[0]

            enough = jnp.sum(jnp.array(sizes) < jnp.max(end_t))
            return jax.lax.switch(enough, [functools.partial(over, size) for size in sizes])

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
    """For prompts that go on: each row sees its slot from 0 to `end_rt`. [R, T, N, H].

    Rows are taken one by one, so that no more than one slot's keys are copied at a time.
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
