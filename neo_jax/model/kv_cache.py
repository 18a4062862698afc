"""The key-value cache: fixed-shape arrays, a row (slot) per running request.

A cache is a dict:

    pre_buffer, post_llm    {"k": store, "v": store} of the stack's l layers
    length_b [B]            number of cached tokens of each row
    t_b [B]                 T position of the row's next token

Each of k and v is a dict with `values` and, for int8, `scale` (a `Store`):

    values [l, B, S, K * width]    width J of keys, H of values
    scale [l, B, K, S] float32     of a token and a head; as [.., S, K], a TPU would pad K to 128

Rows fill from the left without gaps. So a new token sees the interval [0, length], and attention is
that of training. Time comes before heads, so that one token's keys are contiguous and are written
in place.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from neo_jax.model import layer_stack
from neo_jax.model.layers import row_major
from neo_jax.model_config import ModelConfig
from neo_jax.sharding import spec

Cache = dict[str, Any]
Store = dict[str, Any]

STACKS = ("pre_buffer", "post_llm")
KV_DTYPES = ("bfloat16", "float32", "int8")


def empty(c: ModelConfig, params: dict, rows: int, length: int, kv_dtype: str) -> Cache:
    """A cache with no tokens in it. Call it inside jit, under the mesh.

    Its layers are stacked or not as those of `params` are (`layer_stack.py`).
    """

    def zeros(shape, dtype, which):
        return jnp.zeros(shape, dtype, out_sharding=spec(*_NAMES[which]))

    def store(num_layers: int, width: int) -> Store:
        heads = c.num_key_value_heads
        shape = (num_layers, rows, length, heads * width)
        if kv_dtype == "int8":
            scale = zeros((num_layers, rows, heads, length), jnp.float32, "scale")
            return {"values": zeros(shape, jnp.int8, "values"), "scale": scale}
        return {"values": zeros(shape, kv_dtype, "values")}

    def stores(num_layers: int) -> dict[str, Store]:
        return {"k": store(num_layers, c.qk_width), "v": store(num_layers, c.head_dim)}

    cache = {name: layer_stack.make_like(params[name], stores) for name in STACKS if name in params}
    nothing_b = jnp.zeros(rows, jnp.int32, out_sharding=spec("batch"))
    return cache | {"length_b": nothing_b, "t_b": nothing_b}


def num_bytes(c: ModelConfig, kv_dtype: str) -> int:
    """Bytes of one token in the cache, over all devices."""
    numbers = c.num_key_value_heads * (c.qk_width + c.head_dim)
    if kv_dtype == "int8":
        return c.num_layers * (numbers + 2 * 4 * c.num_key_value_heads)
    return c.num_layers * numbers * jnp.dtype(kv_dtype).itemsize


def length(cache: Cache) -> int:
    """S: the number of tokens that a row can hold."""
    return jax.tree.leaves(cache["post_llm"]["k"]["values"])[0].shape[2]


def write_token(store: Store, new_b1: jax.Array, layer: jax.Array, place_b: jax.Array) -> Store:
    """Writes one token [B, 1, K, width] of each row into a layer, at `place_b`."""

    def write(which, old, new, layer, place_b):
        if old.shape[1] == 1:  # XLA does not update in place for a single scatter index
            new, place_b = jnp.tile(new, (2, 1, 1)), jnp.tile(place_b, 2)
        row_b = jnp.arange(len(place_b)) % old.shape[1]
        if which == "scale":
            return old.at[layer, row_b, :, place_b].set(new[..., 0], mode="promise_in_bounds")
        return old.at[layer, row_b, place_b].set(new[:, 0], mode="promise_in_bounds")

    return _write(write, store, new_b1, layer, place_b)


def write_chunk(
    store: Store,
    new_rt: jax.Array,
    layer: jax.Array,
    slot_r: jax.Array,
    start_r: jax.Array,
    count_r: jax.Array,
) -> Store:
    """Writes the first `count_r` of [R, T, K, width] into a layer, at `start_r` of `slot_r`.

    Slots are numbered on each device of the batch axes. A row with count 0 changes nothing.
    """

    def write(which, old, new, layer, slot_r, start_r, count_r):
        if old.dtype == jnp.int8:
            return scatter(old, new, layer, slot_r, start_r, count_r)
        time = 1 if which == "scale" else 0  # of a slot's two dimensions
        length = new.shape[1 + time]

        def write_row(r, old):
            # A window that would pass the end starts earlier, and its tokens are shifted.
            start = jnp.minimum(start_r[r], old.shape[2 + time] - length)
            shift = start_r[r] - start
            index = (layer, slot_r[r], *((0, start) if time else (start, 0)))
            window = jax.lax.dynamic_slice(old, index, (1, 1, *new.shape[1:]))
            place_t = jnp.arange(length) - shift
            is_new_t = (place_t >= 0) & (place_t < count_r[r])
            is_new = is_new_t[None] if time else is_new_t[:, None]
            window = jnp.where(is_new, jnp.roll(new[r], shift, axis=time), window)
            return jax.lax.dynamic_update_slice(old, row_major(window), index)

        return jax.lax.fori_loop(0, new.shape[0], write_row, old)

    def scatter(old, new, layer, slot_r, start_r, count_r):
        # An int8 store has tiles that windows at any offset do not fit: a TPU would copy the store.
        token_t = jnp.arange(new.shape[1])
        is_new_rt = token_t < count_r[:, None]
        place_rt = jnp.where(is_new_rt, start_r[:, None] + token_t, old.shape[2])
        return old.at[layer, slot_r[:, None], place_rt].set(new, mode="drop")

    return _write(write, store, new_rt, layer, slot_r, start_r, count_r)


def read_slot(
    store: Store, layer: jax.Array, slot: jax.Array, num_heads: int, dtype: str
) -> jax.Array:
    """Keys or values [1, S, K, width] of one layer and slot.

    For use inside shard_map, where K is `num_heads`.
    """

    def row(array):
        index = (layer, slot, 0, 0)
        return row_major(jax.lax.dynamic_slice(array, index, (1, 1, *array.shape[2:]))[0])

    part = jax.tree.map(row, store)
    values = part["values"].reshape(*part["values"].shape[:2], num_heads, -1)
    if "scale" in part:
        values = values * part["scale"].swapaxes(1, 2)[..., None]
    return values.astype(dtype)


def copy_slot(cache: Cache, from_d: jax.Array, to_d: jax.Array) -> Cache:
    """Copies keys and values of slot `from_d` to slot `to_d`, on each device of the batch axes."""

    def copy(array, from_d, to_d):
        row = jax.lax.dynamic_slice_in_dim(array, from_d[0], 1, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(array, row, to_d[0], axis=1)

    def run(array, part):
        in_specs = (part, spec("batch"), spec("batch"))
        return jax.shard_map(copy, in_specs=in_specs, out_specs=part, check_vma=False)(
            array, from_d, to_d
        )

    stacks = {name: cache[name] for name in STACKS if name in cache}
    return cache | jax.tree.map(run, stacks, partition(stacks))


def put_rows(array_b: jax.Array, new_r: jax.Array, slot_r: jax.Array, is_valid_r: jax.Array):
    """[B, ...] with the valid rows of [R, ...] written to their slots."""

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


_NAMES = {"values": (None, "batch", None, "heads"), "scale": (None, "batch", "heads", None)}


def partition(stores: Any) -> Any:
    """The partitions of the arrays of a store, or of a tree of stores."""

    def split(path, _):
        (which,) = (entry.key for entry in path if getattr(entry, "key", None) in _NAMES)
        return spec(*_NAMES[which])

    return jax.tree_util.tree_map_with_path(split, stores)


def _write(write, store: Store, new: jax.Array, *arguments: jax.Array) -> Store:
    """Runs `write(which, array, new, *arguments)` for each array of a store, on each device."""

    def run(which, old, new):
        of_old = spec(*_NAMES[which])
        in_specs = (of_old, P(*of_old[1:]), spec(), *[spec("batch")] * (len(arguments) - 1))
        local = functools.partial(write, which)
        local = jax.shard_map(local, in_specs=in_specs, out_specs=of_old, check_vma=False)
        return local(old, new, *arguments)

    new_arrays = _encode(new, store)
    return {which: run(which, store[which], new_arrays[which]) for which in store}


def _encode(new_btkw: jax.Array, store: Store) -> Store:
    """New keys or values in the format of a store: values [B, T, K * width], scale [B, K, T]."""
    if "scale" not in store:
        return {"values": _merge_heads(new_btkw.astype(store["values"].dtype))}
    new_btkw = new_btkw.astype(jnp.float32)
    scale_btk = jnp.maximum(jnp.max(jnp.abs(new_btkw), axis=-1), 1e-30) / 127
    values = jnp.round(new_btkw / scale_btk[..., None]).astype(jnp.int8)
    return {"values": _merge_heads(values), "scale": scale_btk.swapaxes(1, 2)}


def _merge_heads(array_btkw: jax.Array) -> jax.Array:
    """[B, T, K, width] -> [B, T, K * width]."""
    b, t, k, width = array_btkw.shape
    batch, time, heads, _ = jax.typeof(array_btkw).sharding.spec
    return array_btkw.reshape(b, t, k * width, out_sharding=P(batch, time, heads))
