"""The kernels that plans count: their names in programs and what one visit computes.

A visit is a block of queries against a block of keys.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Kernel:
    block_q: int
    block_k: int
    flops_per_pair: int  # of a query and a key, of one head 256 wide with values 128 wide


KERNELS = {
    "interval_attention_forward": Kernel(512, 512, 2 * (256 + 128)),
    "interval_attention_backward": Kernel(512, 512, 2 * (3 * 256 + 2 * 128)),
}
