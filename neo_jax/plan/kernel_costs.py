"""FLOPs and bytes of our kernels, by their names in compiled programs.

A block of attention is a block of queries against a block of keys, one entry of the kernels' block
list.
"""

import math
from collections.abc import Sequence

from neo_jax.kernels import (
    cache_blocks,
    norm_rope,
    pallas_backward,
    pallas_decode,
    pallas_forward,
)
from neo_jax.kernels.flash import BLOCKS
from neo_jax.plan.hlo import Array, Instruction

BLOCK_Q, BLOCK_K = BLOCKS

# Matrix products of a block: how many are as wide as queries and keys, how many as values.
PRODUCTS = {
    pallas_forward.NAME: (1, 1),
    pallas_backward.NAME: (3, 2),
    f"{pallas_backward.NAME}_queries": (2, 1),
    f"{pallas_backward.NAME}_keys": (2, 2),
}

# Streaming kernels do the same with every block of their results. How many numbers a block has, and
# for each kernel, how many times as many bytes as its results it moves, reads included.
STREAM_BLOCK = norm_rope.ROWS * norm_rope.MAX_HEADS * 2 * norm_rope.LANES
STREAMED = {f"{norm_rope.NAME}_forward": 2, f"{norm_rope.NAME}_backward": 3}

# Kernels that move parts of the stacks of caches, as fast as memory gives and takes them.
MOVING = (pallas_decode.NAME, cache_blocks.NAME, cache_blocks.READ_NAME)


def moved_bytes(one: Instruction, operands: Sequence[Instruction]) -> int:
    """Of HBM, that a call of a kernel reads and writes: of stacked caches a layer, all blocks full;
    of what it writes to the cache the blocks, or of single tokens the tiles that they are in."""
    arrays = [array for operand in operands for array in operand.arrays if not array.is_in_vmem]
    results = sum(array.bytes for array in one.arrays if not array.is_in_vmem)
    rest = sum(array.bytes for array in arrays if len(array.shape) < 4)
    if cache_blocks.NAME in one.name:
        return rest + sum(
            map(_written_bytes, (array for each in operands for array in each.arrays))
        )
    if cache_blocks.READ_NAME in one.name:
        values = next(array for array in arrays if len(array.shape) >= 4)
        return rest + results + math.prod(one.arrays[0].shape) * _itemsize(values)
    if pallas_decode.NAME in one.name:
        stacks = [array for array in arrays if len(array.shape) >= 4]
        return rest + results + sum(array.bytes // array.shape[0] for array in stacks)
    return sum(array.bytes for array in arrays) + results


def _written_bytes(new: Array) -> int:
    """Of the cache, for an array of rows [T, width] or tokens [B, 1, width] or [B, K, 1]."""
    if len(new.shape) == 2:
        return new.bytes
    if len(new.shape) != 3:
        return 0
    lanes, heads, width = new.shape
    across = (heads * norm_rope.LANES if width == 1 else width) * _itemsize(new)
    return 2 * lanes * across * (1 if width == 1 else cache_blocks.tile_rows(_itemsize(new)))


def _itemsize(array: Array) -> int:
    return array.bytes // math.prod(array.shape)


def flops_per_pair(kernel: str, qk_width: int, v_width: int) -> int:
    """FLOPs of a kernel for one query and one key, of one head."""
    wide, narrow = PRODUCTS[kernel]
    return 2 * (wide * qk_width + narrow * v_width)
