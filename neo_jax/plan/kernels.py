"""The kernels whose work plans count, by their names in programs.

A visit is a block of queries against a block of keys.
"""

from neo_jax.kernels import norm_rope, pallas_backward, pallas_forward
from neo_jax.kernels.flash import BLOCKS

BLOCK_Q, BLOCK_K = BLOCKS

# Products of a visit: how many are as wide as queries and keys, how many as values.
PRODUCTS = {
    pallas_forward.NAME: (1, 1),
    pallas_backward.NAME: (3, 2),
    f"{pallas_backward.NAME}_queries": (2, 1),
    f"{pallas_backward.NAME}_keys": (2, 2),
}

# Kernels that do the same with every block: its numbers, and how many arrays are read and written.
BLOCK = norm_rope.ROWS * norm_rope.MOST_LANES
STREAMED = {f"{norm_rope.NAME}_forward": 2, f"{norm_rope.NAME}_backward": 3}


def flops_per_pair(kernel: str, qk_width: int, v_width: int) -> int:
    """Of a query and a key, of one head."""
    wide, narrow = PRODUCTS[kernel]
    return 2 * (wide * qk_width + narrow * v_width)
