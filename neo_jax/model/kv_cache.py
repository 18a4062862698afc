"""The key-value cache: a pool of blocks of `block_size` tokens, on each device of the batch axes.

A pool is a dict. `pre_buffer` and `post_llm` hold, for their l layers and all D devices,

    k  {"values": [l, D * num_blocks, block_size, K * J]}
    v  {"values": [l, D * num_blocks, block_size, K * H]}

and for int8 beside each `values` a `scale` [l, D * num_blocks, K, block_size] float32, one for a
token and a head; of [.., block_size, K] a TPU would fill up K to 128. A token's heads lie side by
side, so that one token's keys are one run of memory and are written in place.

Which blocks belong to which sequence is not known here. A block's number counts from 0 on its own
device. Block 0 is nobody's (the null block): what must be written somewhere but belongs to nobody,
such as padding, is written there.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from neo_jax.kernels import cache_blocks
from neo_jax.model import layer_stack
from neo_jax.model.layers import row_major
from neo_jax.model_config import ModelConfig
from neo_jax.sharding import batch_rows, spec

Pool = dict[str, Any]
Store = dict[str, Any]  # `values`, and for int8 their `scale`
Stores = dict[str, Store]  # k and v
Heads = dict[str, jax.Array]  # the same, new: [B, T, K, width]

STACKS = ("pre_buffer", "post_llm")
KV_DTYPES = ("bfloat16", "float32", "int8")
NULL_BLOCK = 0


def empty(c: ModelConfig, params: dict, num_blocks: int, kv_dtype: str, block_size: int) -> Pool:
    """A pool of zeros. Call it inside jit, under the mesh.

    Args:
      params: their stacks of layers say whether those of the pool are stacked (`layer_stack.py`).
      num_blocks: on each device of the batch axes, the null block among them.
    """
    blocks = num_blocks * batch_rows(jax.sharding.get_abstract_mesh())

    def zeros(shape, dtype, which):
        return jnp.zeros(shape, dtype, out_sharding=spec(*_NAMES[which]))

    def store(num_layers: int, width: int) -> Store:
        heads = c.num_key_value_heads
        shape = (num_layers, blocks, block_size, heads * width)
        if kv_dtype == "int8":
            scale = zeros((num_layers, blocks, heads, block_size), jnp.float32, "scale")
            return {"values": zeros(shape, jnp.int8, "values"), "scale": scale}
        return {"values": zeros(shape, kv_dtype, "values")}

    def stores(num_layers: int) -> dict[str, Store]:
        return {"k": store(num_layers, c.qk_width), "v": store(num_layers, c.head_dim)}

    return {name: layer_stack.make_like(params[name], stores) for name in STACKS if name in params}


def num_bytes(c: ModelConfig, kv_dtype: str) -> int:
    """Bytes that one token takes in the pool, over all devices."""
    numbers = c.num_key_value_heads * (c.qk_width + c.head_dim)
    if kv_dtype == "int8":
        return c.num_layers * (numbers + 2 * 4 * c.num_key_value_heads)
    return c.num_layers * numbers * jnp.dtype(kv_dtype).itemsize


def block_size(pool: Pool) -> int:
    """How many tokens a block has."""
    return jax.tree.leaves(pool["post_llm"]["k"]["values"])[0].shape[2]


def write_token(
    stores: Stores,
    new: Heads,
    layer: jax.Array,
    block_b: jax.Array,
    place_b: jax.Array,
    kernel=None,
) -> Stores:
    """Puts one token's [B, 1, K, width] of k and v into a layer, at a place of each lane's block.

    Args:
      kernel: True: the TPU kernel, interpreted where there is no TPU; None: the best.
    """

    def in_xla(which, old, new, layer, block_b, place_b):
        if len(block_b) == 1:  # XLA does not update in place for a single scatter index
            new, block_b, place_b = (
                jnp.concatenate([part, part]) for part in (new, block_b, place_b)
            )
        if which == "scale":
            return old.at[layer, block_b, :, place_b].set(new[..., 0], mode="promise_in_bounds")
        return old.at[layer, block_b, place_b].set(new[:, 0], mode="promise_in_bounds")

    def in_pallas(values, scales, new_values, new_scales, *places, **options):
        new_values = [new[:, 0] for new in new_values]
        new_scales = [new[..., 0] for new in new_scales]
        arrays = values, scales, new_values, new_scales
        return cache_blocks.write_tokens(*arrays, *places, **options)

    return _written(in_xla, in_pallas, kernel, stores, new, layer, block_b, place_b)


def write_rows(
    stores: Stores,
    new: Heads,
    layer: jax.Array,
    block_r: jax.Array,
    first_r: jax.Array,
    kernel=None,
) -> Stores:
    """Puts rows of `block_size` tokens of k and v into blocks of a layer.

    Args:
      new: [D, T, K, width] each, rows side by side.
      block_r: [D * T / block_size] the block of each row.
      first_r: the same; places of the block before this one keep the tokens that they have. What
        comes after a sequence's last token is written too, and nobody sees it.
      kernel: as for `write_token`.
    """

    def in_xla(which, old, new, layer, block_r, first_r):
        rows, size = len(block_r), new.shape[2 if which == "scale" else 1] // len(block_r)
        token_t = jnp.arange(size)
        if which == "scale":
            new = new[0].reshape(-1, rows, size).swapaxes(0, 1)
        else:
            new, token_t = new.reshape(rows, size, -1), token_t[:, None]

        def write_row(r, old):
            index = (layer, block_r[r], 0, 0)
            block = jax.lax.dynamic_slice(old, index, (1, 1, *new.shape[1:]))
            block = jnp.where(token_t < first_r[r], block, new[r])
            return jax.lax.dynamic_update_slice(old, row_major(block), index)

        return jax.lax.fori_loop(0, rows, write_row, old)

    def in_pallas(values, scales, new_values, new_scales, *places, **options):
        new_values, new_scales = ([new[0] for new in many] for many in (new_values, new_scales))
        arrays = values, scales, new_values, new_scales
        return cache_blocks.write_rows(*arrays, *places, **options)

    return _written(in_xla, in_pallas, kernel, stores, new, layer, block_r, first_r)


def gather_blocks(
    store: Store, layer: jax.Array, blocks_c: jax.Array, num_heads: int, dtype: str, kernel=None
) -> jax.Array:
    """[1, C * block_size, K, width] of one layer's blocks, side by side. For use inside shard_map,
    where K is `num_heads`; `kernel`: as for `write_token`."""

    def in_xla(store, layer, blocks_c):
        found = jax.tree.map(
            lambda array: row_major(array.at[layer, blocks_c].get(mode="promise_in_bounds")), store
        )
        c, size, _ = found["values"].shape
        values = found["values"].reshape(c, size, num_heads, -1)
        if "scale" in found:
            values = values * found["scale"].swapaxes(1, 2)[..., None]
        return values.astype(dtype).reshape(1, c * size, num_heads, -1)

    def in_pallas(store, layer, blocks_c, **options):
        arrays = store["values"], store["scale"], layer, blocks_c
        found = cache_blocks.read_int8(*arrays, dtype, **options)
        return found.reshape(1, len(found), num_heads, -1)

    arrays = (store, jnp.asarray(layer), blocks_c)
    if "scale" not in store or not (kernel or cache_blocks.fits([store["values"]])):
        return in_xla(*arrays)
    return _choose(kernel, in_xla, in_pallas)(*arrays)


def _choose(kernel, in_xla, in_pallas):
    if kernel:
        in_xla = functools.partial(in_pallas, is_interpreted=True)
    return lambda *arrays: jax.lax.platform_dependent(*arrays, tpu=in_pallas, default=in_xla)


def put_rows(array_b: jax.Array, new_r: jax.Array, lane_r: jax.Array, is_valid_r: jax.Array):
    """[B, ...] with the valid rows of [R, ...] put into their lanes, counted on each device."""

    def put(array, new, lane_r, is_valid_r):
        def put_row(r, array):
            row = jnp.where(is_valid_r[r], new[r].astype(array.dtype), array[lane_r[r]])
            return jax.lax.dynamic_update_index_in_dim(array, row, lane_r[r], axis=0)

        return jax.lax.fori_loop(0, new.shape[0], put_row, array)

    part = spec("batch", *[None] * (array_b.ndim - 1))
    in_specs = (part, part, spec("batch"), spec("batch"))
    return jax.shard_map(put, in_specs=in_specs, out_specs=part, check_vma=False)(
        array_b, new_r, lane_r, is_valid_r
    )


_NAMES = {"values": (None, "batch", None, "heads"), "scale": (None, "batch", "heads", None)}


def partition(stores: Any) -> Any:
    """How the arrays of a store, or of a tree of stores, are split over the mesh."""

    def split(path, _):
        (which,) = (entry.key for entry in path if getattr(entry, "key", None) in _NAMES)
        return spec(*_NAMES[which])

    return jax.tree_util.tree_map_with_path(split, stores)


def _written(in_xla, in_pallas, kernel, stores: Stores, new: Heads, *arguments: jax.Array):
    """The stores with something written, on each device's part of them.

    Args:
      in_xla: (name of an array, array, new, *arguments) -> array.
      in_pallas: (values, scales, new values, new scales, *arguments) -> values and scales.
    """

    def each(stores, new, *arguments):
        return {
            kind: {
                which: in_xla(which, array, new[kind][which], *arguments)
                for which, array in store.items()
            }
            for kind, store in stores.items()
        }

    def together(stores, new, *arguments, **options):
        arrays = [
            [tree[kind][which] for kind in tree if which in tree[kind]]
            for tree in (stores, new)
            for which in ("values", "scale")
        ]
        found = iter(in_pallas(*arrays, *arguments, **options))
        names = [(kind, which) for which in ("values", "scale") for kind in stores]
        written = {kind: {} for kind in stores}
        for kind, which in names:
            if which in stores[kind]:
                written[kind][which] = next(found)
        return written

    def local(stores, new, *arguments):
        if not kernel and not cache_blocks.fits([store["values"] for store in stores.values()]):
            return each(stores, new, *arguments)
        return _choose(kernel, each, together)(stores, new, *arguments)

    new = {kind: _encoded(new[kind], store) for kind, store in stores.items()}
    of_stores = partition(stores)
    of_new = jax.tree.map(lambda of_array: P(*of_array[1:]), of_stores)
    in_specs = (of_stores, of_new, spec(), *[spec("batch")] * (len(arguments) - 1))
    run = jax.shard_map(local, in_specs=in_specs, out_specs=of_stores, check_vma=False)
    return run(stores, new, jnp.asarray(arguments[0]), *arguments[1:])


def _encoded(new_btkw: jax.Array, store: Store) -> Store:
    """New keys or values as a store has them: values [B, T, K * width], scale [B, K, T]."""
    if "scale" not in store:
        return {"values": _together(new_btkw.astype(store["values"].dtype))}
    new_btkw = new_btkw.astype(jnp.float32)
    scale_btk = jnp.maximum(jnp.max(jnp.abs(new_btkw), axis=-1), 1e-30) / 127
    values = jnp.round(new_btkw / scale_btk[..., None]).astype(jnp.int8)
    return {"values": _together(values), "scale": scale_btk.swapaxes(1, 2)}


def _together(array_btkw: jax.Array) -> jax.Array:
    b, t, k, width = array_btkw.shape
    batch, time, heads, _ = jax.typeof(array_btkw).sharding.spec
    return array_btkw.reshape(b, t, k * width, out_sharding=P(batch, time, heads))
