"""The kernels whose work plans count, by their names in programs.

A visit is a block of queries against a block of keys.
"""

from collections.abc import Sequence

from neo_jax.kernels import decode_attention, norm_rope, pallas_backward, pallas_forward
from neo_jax.kernels.flash import BLOCKS
from neo_jax.plan.hlo import Instruction

BLOCK_Q, BLOCK_K = BLOCKS

# Products of a visit: how many are as wide as queries and keys, how many as values.
PRODUCTS = {
    pallas_forward.NAME: (1, 1),
    pallas_backward.NAME: (3, 2),
    f"{pallas_backward.NAME}_queries": (2, 1),
    f"{pallas_backward.NAME}_keys": (2, 2),
}

# Kernels that do the same with every block of their results: its numbers, and how many times those
# are moved, counting what is read.
BLOCK = norm_rope.ROWS * norm_rope.MOST_HEADS * 2 * norm_rope.LANES
STREAMED = {f"{norm_rope.NAME}_forward": 2, f"{norm_rope.NAME}_backward": 3}

# Kernels that read one layer of stacks of caches, as fast as memory gives it.
STACKED = {decode_attention.NAME}


def read_bytes(one: Instruction, operands: Sequence[Instruction]) -> int:
    """Of HBM, by a call of a kernel: of stacked caches a layer, with all slots full."""
    arrays = [array for operand in operands for array in operand.arrays if not array.is_in_vmem]
    if not any(name in one.name for name in STACKED):
        return sum(array.bytes for array in arrays)
    stacks = [array for array in arrays if len(array.shape) >= 4]
    rest = sum(array.bytes for array in arrays if len(array.shape) < 4)
    return rest + sum(array.bytes // array.shape[0] for array in stacks)


def flops_per_pair(kernel: str, qk_width: int, v_width: int) -> int:
    """Of a query and a key, of one head."""
    wide, narrow = PRODUCTS[kernel]
    return 2 * (wide * qk_width + narrow * v_width)
