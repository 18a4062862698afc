"""FLOPs and bytes of our kernels, by their names in compiled programs.

A block of attention is a block of queries against a block of keys, one entry of the kernels' block
list.
"""

from collections.abc import Sequence

from neo_jax.kernels import decode_attention, norm_rope, pallas_backward, pallas_forward
from neo_jax.kernels.flash import BLOCKS
from neo_jax.plan.hlo import Instruction

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

# Kernels that read one layer of stacked caches; memory bandwidth bounds them.
STACKED = {decode_attention.NAME}


def read_bytes(one: Instruction, operands: Sequence[Instruction]) -> int:
    """Bytes of HBM that a kernel's call reads: of stacked caches, one layer with all slots full."""
    arrays = [array for operand in operands for array in operand.arrays if not array.is_in_vmem]
    if not any(name in one.name for name in STACKED):
        return sum(array.bytes for array in arrays)
    stacks = [array for array in arrays if len(array.shape) >= 4]
    rest = sum(array.bytes for array in arrays if len(array.shape) < 4)
    return rest + sum(array.bytes // array.shape[0] for array in stacks)


def flops_per_pair(kernel: str, qk_width: int, v_width: int) -> int:
    """FLOPs of a kernel for one query and one key, of one head."""
    wide, narrow = PRODUCTS[kernel]
    return 2 * (wide * qk_width + narrow * v_width)
