"""The key-value cache: fixed-shape arrays, a row (slot) per running request.

A cache is a dict. `pre_buffer` and `post_llm` hold {"k": [l, B, S, K, J], "v": [l, B, S, K, H]}
of their l layers; `length_b` says how many places of each row are taken, and `t_b` is the T
position of the row's next token. Rows fill from the left without gaps, so what a new token sees is
the interval [0, length], and the attention rule of training serves unchanged. Time comes before
heads, so that one token's keys are one run of memory and are written in place.

With `int8`, an array is a dict of `values` int8 and `scale` float32, one scale per token and head.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from neo_jax.config import ModelConfig
from neo_jax.model.decoder import Apart
from neo_jax.sharding import spec

Cache = dict[str, Any]
Store = Any  # an array [l, B, S, K, width], or its int8 form

STACKS = ("pre_buffer", "post_llm")
KV_DTYPES = ("bfloat16", "float32", "int8")


def empty(c: ModelConfig, rows: int, length: int, kv_dtype: str, is_apart: bool = False) -> Cache:
    """A cache with no tokens in it. Call it inside jit, under the mesh.

    `is_apart`: for parameters whose layers are apart (`decoder.Apart`); each layer's part of the
    cache is then an array of its own, [1, B, S, K, width].
    """

    def zeros(shape, dtype):
        return jnp.zeros(shape, dtype, out_sharding=spec(*_STORE[: len(shape)]))

    def store(num_layers: int, width: int) -> Store:
        shape = (num_layers, rows, length, c.num_key_value_heads)
        if kv_dtype == "int8":
            return {"values": zeros((*shape, width), jnp.int8), "scale": zeros(shape, jnp.float32)}
        return zeros((*shape, width), kv_dtype)

    def stack(depth: int, width: int) -> Store:
        if not is_apart:
            return store(depth, width)
        return jax.tree.map(lambda *parts: Apart(parts), *(store(1, width) for _ in range(depth)))

    cache = {
        name: {"k": stack(depth, c.qk_width), "v": stack(depth, c.head_dim)}
        for name, depth in zip(
            STACKS, (c.num_pre_buffer_layers, c.num_post_llm_layers), strict=True
        )
        if depth
    }
    nothing_b = jnp.zeros(rows, jnp.int32, out_sharding=spec("batch"))
    return cache | {"length_b": nothing_b, "t_b": nothing_b}


def num_bytes(c: ModelConfig, kv_dtype: str) -> int:
    """Bytes that one token takes in the cache, over all devices."""
    numbers = c.num_key_value_heads * (c.qk_width + c.head_dim)
    if kv_dtype == "int8":
        return c.num_layers * (numbers + 2 * 4 * c.num_key_value_heads)
    return c.num_layers * numbers * jnp.dtype(kv_dtype).itemsize


def length(cache: Cache) -> int:
    """S: for how many tokens each row has room."""
    return jax.tree.leaves(cache["post_llm"])[0].shape[2]


def write_token(store: Store, new_b1: jax.Array, layer: jax.Array, place_b: jax.Array) -> Store:
    """Puts one token's [B, 1, K, width] into a layer, at each row's place."""

    def write_rows(old, new, layer, place_b):
        if old.shape[1] == 1:  # of a single update XLA makes something that copies the store
            new, place_b = jnp.tile(new, (2,) + (1,) * (new.ndim - 1)), jnp.tile(place_b, 2)
        row_b = jnp.arange(len(place_b)) % old.shape[1]
        return old.at[layer, row_b, place_b].set(new[:, 0], mode="promise_in_bounds")

    def write(old, new):
        old_spec = _part(old, _STORE)
        in_specs = (old_spec, _part(new, _ROWS), spec(), spec("batch"))
        run = jax.shard_map(write_rows, in_specs=in_specs, out_specs=old_spec, check_vma=False)
        return run(old, new, layer, place_b)

    return jax.tree.map(write, store, _encoded(new_b1, store))


def write_chunk(
    store: Store,
    new_rt: jax.Array,
    layer: jax.Array,
    slot_r: jax.Array,
    start_r: jax.Array,
    count_r: jax.Array,
) -> Store:
    """Puts the first `count_r` of [R, T, K, width] into a layer, at places `start_r` of `slot_r`.

    Slots are numbered on each device of the batch axes. A row with count 0 changes nothing.
    """

    def write_rows(old, new, layer, slot_r, start_r, count_r):
        length, rest = new.shape[1], (0,) * (old.ndim - 3)

        def write_row(r, old):
            # A window that would stick out at the end begins earlier, its content shifted.
            start = jnp.minimum(start_r[r], old.shape[2] - length)
            shift = start_r[r] - start
            index = (layer, slot_r[r], start, *rest)
            window = jax.lax.dynamic_slice(old, index, (1, 1, *new.shape[1:]))
            place_t = jnp.arange(length) - shift
            is_new_t = ((place_t >= 0) & (place_t < count_r[r])).reshape(length, *[1] * len(rest))
            window = jnp.where(is_new_t, jnp.roll(new[r], shift, axis=0), window)
            return jax.lax.dynamic_update_slice(old, _in_order(window), index)

        return jax.lax.fori_loop(0, new.shape[0], write_row, old)

    def write(old, new):
        old_spec, new_spec = _part(old, _STORE), _part(new, _ROWS)
        in_specs = (old_spec, new_spec, spec(), *[spec("batch")] * 3)
        run = jax.shard_map(write_rows, in_specs=in_specs, out_specs=old_spec, check_vma=False)
        return run(old, new, layer, slot_r, start_r, count_r)

    return jax.tree.map(write, store, _encoded(new_rt, store))


def read(store: Store, layer: jax.Array, dtype: str) -> jax.Array:
    """[B, S, K, width] of one layer."""

    def rows(array):
        return jax.lax.dynamic_index_in_dim(array, layer, axis=0, keepdims=False)

    return _decoded(jax.tree.map(rows, store), dtype)


def read_slot(store: Store, layer: jax.Array, slot: jax.Array, dtype: str) -> jax.Array:
    """[1, S, K, width] of one layer and slot. For use inside shard_map."""

    def row(array):
        index = (layer, slot, *[0] * (array.ndim - 2))
        return _in_order(jax.lax.dynamic_slice(array, index, (1, 1, *array.shape[2:]))[0])

    return _decoded(jax.tree.map(row, store), dtype)


def copy_slot(cache: Cache, from_d: jax.Array, to_d: jax.Array) -> Cache:
    """Copies keys and values of one slot to another, on each device of the batch axes its own."""

    def copy(array, from_d, to_d):
        row = jax.lax.dynamic_slice_in_dim(array, from_d[0], 1, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(array, row, to_d[0], axis=1)

    def run(array):
        part = _part(array, _STORE)
        in_specs = (part, spec("batch"), spec("batch"))
        return jax.shard_map(copy, in_specs=in_specs, out_specs=part, check_vma=False)(
            array, from_d, to_d
        )

    return cache | {name: jax.tree.map(run, cache[name]) for name in STACKS if name in cache}


def put_rows(array_b: jax.Array, new_r: jax.Array, slot_r: jax.Array, is_valid_r: jax.Array):
    """[B, ...] with the valid rows of [R, ...] put into their slots."""

    def put(array, new, slot_r, is_valid_r):
        def put_row(r, array):
            row = jnp.where(is_valid_r[r], new[r].astype(array.dtype), array[slot_r[r]])
            return jax.lax.dynamic_update_index_in_dim(array, row, slot_r[r], axis=0)

        return jax.lax.fori_loop(0, new.shape[0], put_row, array)

    part = spec("batch", *[None] * (array_b.ndim - 1))
    in_specs = (part, part, spec("batch"), spec("batch"))
    return jax.shard_map(put, in_specs=in_specs, out_specs=part, check_vma=False)(
        array_b, new_r, slot_r, is_valid_r
    )


_STORE = (None, "batch", None, "heads", None)
_ROWS = ("batch", None, "heads", None)


def _in_order(array: jax.Array) -> jax.Array:
    """The array, its last dimension contiguous: another order that suits attention better is then
    made of this part alone, and not of the whole cache that it is read from or written to."""
    return with_layout_constraint(array, Layout(tuple(range(array.ndim))))


def partition(store: dict[str, Store]) -> Any:
    """How the arrays of {"k": ..., "v": ...} are split over the mesh."""
    return jax.tree.map(lambda array: _part(array, _STORE), store)


def _decoded(store: Store, dtype: str) -> jax.Array:
    """The numbers of a store, or of a part of one."""
    if isinstance(store, dict):
        return (store["values"] * store["scale"][..., None]).astype(dtype)
    return store.astype(dtype)


def _part(array: jax.Array, names: tuple[str | None, ...]):
    return spec(*names[: array.ndim])


def _encoded(new_bt: jax.Array, store: Store) -> Store:
    """New keys or values in the form of the store."""
    if not isinstance(store, dict):
        return new_bt.astype(store.dtype)
    new_bt = new_bt.astype(jnp.float32)
    scale_bt = jnp.maximum(jnp.max(jnp.abs(new_bt), axis=-1), 1e-30) / 127
    return {"values": jnp.round(new_bt / scale_bt[..., None]).astype(jnp.int8), "scale": scale_bt}
