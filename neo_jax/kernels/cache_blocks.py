"""Writing to and reading from blocks of the cache on TPUs, where XLA would take long or copy it.

Arrays are written in place: a kernel gets them and gives them back, and touches the blocks alone
that it is told. What a step does not write of its block, it puts back as it was.

An array is values [l, num_blocks, size, width], tokens down, or scales [l, num_blocks, K, size],
tokens across; see `model/kv_cache.py`.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

NAME = "cache_write"
READ_NAME = "cache_read"
LANES = 128


def fits(values: Sequence[jax.Array]) -> bool:
    """Whether the kernels take a device's parts of arrays of values."""
    return not any(array.shape[2] % LANES or array.shape[3] % LANES for array in values)


def tile_rows(itemsize: int) -> int:
    """How many rows of numbers of so many bytes a tile has."""
    return 32 // itemsize


def in_hbm(array: jax.Array) -> jax.Array:
    """Keeps the compiler from moving an array of the cache into fast memory and back, which it does
    with one that is small enough, such as a short cache's scales."""
    return pltpu.with_memory_space_constraint(array, pltpu.HBM)


def write_rows(values, scales, new_values, new_scales, layer, block_r, first_r, **options):
    """The arrays with rows of `size` tokens put into blocks of a layer.

    Args:
      values, scales: lists of arrays.
      new_values: [T, width] each, rows side by side; new_scales: [K, T].
      block_r: [T / size] the block of each row.
      first_r: places of the block before this one keep what they have.
    """
    size = values[0].shape[2]

    def of_values(width):
        return (size, width), (lambda r, layer, block, first: (r, 0))

    def of_scales(heads):
        return (heads, size), (lambda r, layer, block, first: (0, r))

    def of_block(r, layer, block, first):
        return layer[0], block[r], 0, 0

    def of_old(r, layer, block, first):
        # Nothing of the block is kept, mostly: then it is not read.
        return layer[0], jnp.where(first[r] > 0, block[r], 0), 0, 0

    def kernel(layer_ref, block_ref, first_ref, *refs):
        first = first_ref[pl.program_id(0)]
        count = len(refs) // 3
        for number in range(count):
            new_ref, old_ref, out_ref = refs[number::count]
            axis = 0 if number < len(values) else 1

            @pl.when(first == 0)
            def _(new_ref=new_ref, out_ref=out_ref):
                out_ref[...] = new_ref[...]

            @pl.when(first > 0)
            def _(new_ref=new_ref, old_ref=old_ref, out_ref=out_ref, axis=axis):
                place = jax.lax.broadcasted_iota(jnp.int32, out_ref.shape, axis)
                out_ref[...] = jnp.where(place < first, old_ref[...], new_ref[...])

    specs = [of_values(array.shape[1]) for array in new_values]
    specs += [of_scales(array.shape[0]) for array in new_scales]
    blocks = [(None, None, *array.shape[2:]) for array in (*values, *scales)]
    return _call(
        kernel,
        (layer, block_r, first_r),
        [*new_values, *new_scales],
        specs,
        [*values, *scales],
        [(block, of_old) for block in blocks],
        [(block, of_block) for block in blocks],
        **options,
    )


def write_tokens(values, scales, new_values, new_scales, layer, block_b, place_b, **options):
    """The arrays with a token of each lane put at a place of its block.

    Args:
      new_values: [B, width] each; new_scales: [B, K].
    """

    def window(array):
        """As many tokens as a tile has, of values; of scales a block."""
        return tile_rows(array.dtype.itemsize), array.shape[3]

    def of_values(b, layer, block, place, tokens):
        return layer[0], block[b], place[b] // tokens, 0

    def of_scales(b, layer, block, place):
        return layer[0], block[b], 0, 0

    def of_lane(b, layer, block, place):
        return b, 0, 0

    def kernel(layer_ref, block_ref, place_ref, *refs):
        place, count = place_ref[pl.program_id(0)], len(refs) // 3
        for number in range(count):
            new_ref, old_ref, out_ref = refs[number::count]
            axis = 0 if number < len(values) else 1
            row = jax.lax.broadcasted_iota(jnp.int32, out_ref.shape, axis)
            is_here = row == place % out_ref.shape[axis]
            # 32 bits, since masks of narrower numbers have other tiles.
            old, new = (_wide(ref[...]) for ref in (old_ref, new_ref))
            out_ref[...] = jnp.where(is_here, new, old).astype(out_ref.dtype)

    windows = [window(array) for array in values]
    pool = [
        ((None, None, *shape), functools.partial(of_values, tokens=shape[0])) for shape in windows
    ]
    pool += [((None, None, *array.shape[2:]), of_scales) for array in scales]
    new = [*(array[:, None] for array in new_values), *(array[..., None] for array in new_scales)]
    return _call(
        kernel,
        (layer, block_b, place_b),
        new,
        [((None, *array.shape[1:]), of_lane) for array in new],
        [*values, *scales],
        pool,
        pool,
        **options,
    )


def _wide(array: jax.Array) -> jax.Array:
    return array.astype(jnp.int32 if array.dtype == jnp.int8 else jnp.float32)


def _call(kernel, scalars, new, of_new, old, of_old, of_out, is_interpreted=False):
    """A step for each of scalars[1]; all arrays of `old` are written in place."""
    layer, block, place = (jnp.asarray(scalar, jnp.int32) for scalar in scalars)
    old = old if is_interpreted else [in_hbm(array) for array in old]
    moved = (
        2
        * len(block)
        * sum(
            array.dtype.itemsize * math.prod(extent or 1 for extent in shape)
            for (shape, _), array in zip(of_out, old, strict=True)
        )
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(len(block),),
            in_specs=[pl.BlockSpec(*spec) for spec in (*of_new, *of_old)],
            out_specs=[pl.BlockSpec(*spec) for spec in of_out],
        ),
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in old],
        input_output_aliases={3 + len(new) + number: number for number in range(len(old))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved),
        name=NAME,
        interpret=is_interpreted,
    )(layer.reshape(1), block, place, *new, *old)


def read_int8(values, scale, layer, blocks_c, dtype, is_interpreted=False):
    """[C * size, width] of blocks of a layer, side by side, as floating point.

    Args:
      values: [l, num_blocks, size, width] int8; scale: [l, num_blocks, K, size].
    """
    heads, size = scale.shape[2:]
    width = values.shape[3]
    if not is_interpreted:
        values, scale = in_hbm(values), in_hbm(scale)

    def kernel(layer_ref, blocks_ref, values_ref, scale_ref, out_ref):
        scale_sk = scale_ref[...].T
        for head in range(heads):
            part = slice(head * width // heads, (head + 1) * width // heads)
            numbers = values_ref[:, part].astype(jnp.float32)
            out_ref[:, part] = (numbers * scale_sk[:, head : head + 1]).astype(dtype)

    def of_block(c, layer, blocks):
        return layer[0], blocks[c], 0, 0

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(len(blocks_c),),
            in_specs=[
                pl.BlockSpec((None, None, size, width), of_block),
                pl.BlockSpec((None, None, heads, size), of_block),
            ],
            out_specs=pl.BlockSpec((size, width), lambda c, layer, blocks: (c, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((len(blocks_c) * size, width), dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name=READ_NAME,
        interpret=is_interpreted,
    )(jnp.asarray(layer, jnp.int32).reshape(1), blocks_c.astype(jnp.int32), values, scale)
