"""Runs a kernel on each device's shard: heads and rows are split over the mesh, nothing else."""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


def is_fully_manual() -> bool:
    """Whether all mesh axes are manual: arrays are then one device's shards, as in `shard_map`."""
    kinds = jax.sharding.get_abstract_mesh().axis_types
    return all(kind == AxisType.Manual for kind in kinds)


def shard_kernel(kernel: Callable, arrays: Sequence, out_like: int) -> jax.Array:
    """`kernel(*arrays)` on each device's shards, split as the arrays' types say.

    Args:
      arrays: arrays, or trees of arrays.
      out_like: index of the array whose partition the result has.
    """
    if is_fully_manual():
        return kernel(*arrays)
    in_specs = [partition(array) for array in arrays]
    run = jax.shard_map(
        kernel, in_specs=tuple(in_specs), out_specs=in_specs[out_like], check_vma=False
    )
    return run(*arrays)


def partition(array) -> P:
    """The partition of an array, or of each of a tree of arrays, over the mesh."""
    return jax.tree.map(lambda leaf: P(*jax.typeof(leaf).sharding.spec), array)
