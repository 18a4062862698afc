"""Kernels see one device's part of an array: heads and rows split over a mesh, all else whole."""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


def is_on_device() -> bool:
    """Whether this runs on one device's part already, inside shard_map."""
    kinds = jax.sharding.get_abstract_mesh().axis_types
    return all(kind == AxisType.Manual for kind in kinds)


def shard_kernel(local: Callable, arrays: Sequence, out_like: int) -> jax.Array:
    """`local(*arrays)` on each device's parts, split as the arrays' types say.

    Args:
      arrays: arrays, or trees of arrays.
      out_like: the number of the array that the result is split like.
    """
    if is_on_device():
        return local(*arrays)
    in_specs = [partition(array) for array in arrays]
    run = jax.shard_map(
        local, in_specs=tuple(in_specs), out_specs=in_specs[out_like], check_vma=False
    )
    return run(*arrays)


def partition(array) -> P:
    """How an array, or each of a tree of arrays, is split over the mesh."""
    return jax.tree.map(lambda leaf: P(*jax.typeof(leaf).sharding.spec), array)
