"""The table of TPU generations: a device's FLOPs, memory and links, and the compiler's options.

A device is a device of JAX: a chip, but half a chip on v7x. Sources: the TPU pages of the Google
Cloud documentation (v5e, v5p, v6e, TPU7x) for FLOPs, memory and links; `usable_gib` is the limit
that the compiler itself names when a program does not fit. `clock` turns the compiler's cycles into
seconds: at this clock, the products that the compiler counts per cycle give the documented FLOPs.
"""

import dataclasses

from neo_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
    name: str
    spelling: str  # the compiler's name for it, in topologies
    flops: float  # dense bfloat16, per second of a device
    clock: float  # cycles per second
    usable_gib: float  # HBM of a device that a program can use
    hbm_bandwidth: float  # bytes per second of a device
    link_bandwidth: float  # bytes per second of one link between neighbours, one way
    ring: int  # a side of the slice is a ring if its length is a multiple of this
    cores: int  # of a device; each computes its share of a kernel's heads
    flags: tuple[tuple[str, str], ...]  # of the compiler, for runs and plans
    to_read: tuple[tuple[str, str], ...]  # for plans only

    def options(self, with_flags: bool = True) -> dict[str, str]:
        """The compiler's options for a plan."""
        return dict(self.to_read) | (dict(self.flags) if with_flags else {})


# The VMEM that a fusion may use: half of a chip's. By the compiler's own estimate, this saves a
# sixth of a step's cycles; compiling takes several times as long.
_VMEM = (("xla_tpu_scoped_vmem_limit_kib", "65536"),)
_VMEM_V5P = (("xla_tpu_scoped_vmem_limit_kib", "32768"),)

# The compiler cannot print what it offloads to the SparseCore (jaxlib 0.10.2 with libtpu 0.0.52).
# So plans keep gathers of embedding rows on the TensorCore, on v7x collectives too. A real run can
# hide those better than its plan says.
_GATHERS = (("xla_tpu_offload_gather_to_sparsecore", "false"),)
_ALL_OFFLOADS = (
    *_GATHERS,
    ("xla_tpu_enable_offloading_scatter_to_sparsecore", "false"),
    *(
        (f"xla_tpu_enable_sparse_core_collective_offload_{kind}", "false")
        for kind in ("all_gather", "all_reduce", "reduce_scatter")
    ),
)

_TABLE = (
    ("v5e", "v5e", 197e12, 1.5e9, 15.75, 819e9, 45e9, 16, 1, _VMEM, ()),
    ("v5p", "v5p", 459e12, 1.75e9, 95.73, 2765e9, 90e9, 4, 2, _VMEM_V5P, _GATHERS),
    ("v6e", "v6e", 918e12, 1.75e9, 31.24, 1638e9, 90e9, 16, 1, _VMEM, _GATHERS),
    ("v7x", "tpu7x", 1153.5e12, 2.2e9, 94.74, 3690e9, 90e9, 4, 1, (), _ALL_OFFLOADS),
)
CHIPS = {row[0]: Chip(*row) for row in _TABLE}


def find_chip(name: str) -> Chip:
    """The row of a generation, such as "v5e"; InputError names the known ones."""
    if name not in CHIPS:
        raise InputError(f"{name!r}: no such TPU; there are {', '.join(CHIPS)}")
    return CHIPS[name]
