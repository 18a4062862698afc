"""The collectives of a training step, written out.

A training step is written for one device (`shard_map_over_data`), so only this file moves data
between devices:

    parameter shard         ── all_gather_fsdp ──▶  weight
    gradient of the weight  ── reduce_scatter ──▶   gradient shard  ── psum_replicated ──▶  sum
    columns of a row        ── all_gather_sequence ──▶  whole row  ── local_sequence ──▶  columns
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from neo_jax.sharding import FSDP, MESH_AXES, manual_axes, without_axes

DATA_AXES = ("data", *FSDP)  # the manual axes of a training step
# XLA:TPU turns a reduce-scatter into an all-reduce for some widths. Wider rows are padded to a
# multiple of this.
EVEN_WIDTH = 2048


def shard_map_over_data(local: Callable, in_specs, out_specs) -> Callable:
    """Runs `local` on each device's rows and columns of a batch and shards of parameters.

    Specs are those of the global arrays. The axis `tensor` is not manual: it stays in the arrays'
    types.
    """
    manual_part = functools.partial(without_axes, axes=("tensor",))
    in_specs, out_specs = (
        jax.tree.map(manual_part, specs, is_leaf=lambda leaf: isinstance(leaf, P))
        for specs in (in_specs, out_specs)
    )
    return jax.shard_map(
        local,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(DATA_AXES),
        check_vma=False,
    )


def all_gather_fsdp(weight: jax.Array, partition: P) -> jax.Array:
    """All-gathers a parameter over fsdp; its gradient is a `reduce_scatter`.

    Args:
      weight: a device's shard. Outside `shard_map_over_data` the weight is returned as it is.
      partition: of the global array, from `partition_spec`.
    """
    if FSDP not in tuple(partition) or "fsdp" not in manual_axes():
        return weight

    @jax.custom_vjp
    def gather(shard):
        return _move_rows(_gather_rows, shard, partition)

    def backward(_, dweight):
        return (reduce_scatter(dweight, partition),)

    gather.defvjp(lambda shard: (gather(shard), None), backward)
    return gather(weight)


def reduce_scatter(gradient: jax.Array, partition: P) -> jax.Array:
    """This device's shard of the sum over fsdp. For use in `shard_map_over_data`."""
    return _move_rows(_scatter_rows, gradient, partition)


def _gather_rows(shard: jax.Array) -> jax.Array:
    for axis in reversed(FSDP):
        shard = jax.lax.all_gather(shard, axis, axis=0, tiled=True)
    return shard


def _scatter_rows(rows: jax.Array) -> jax.Array:
    width = rows.shape[1]
    if width > EVEN_WIDTH:
        rows = jnp.pad(rows, ((0, 0), (0, -width % EVEN_WIDTH)))
    for axis in FSDP:
        rows = jax.lax.psum_scatter(rows, axis, scatter_dimension=0, tiled=True)
    return rows[:, :width]


def _move_rows(move: Callable, array: jax.Array, partition: P) -> jax.Array:
    """Runs `move` on a row-major matrix whose rows are the dimension that fsdp splits.

    For any other layout, XLA:TPU turns the reduce-scatter into an all-reduce.
    """
    dimension = tuple(partition).index(FSDP)

    def local(array):
        array = jnp.moveaxis(array, dimension, 0)
        rows = with_layout_constraint(array.reshape(array.shape[0], -1), Layout((0, 1)))
        moved = move(rows)
        return jnp.moveaxis(moved.reshape(-1, *array.shape[1:]), 0, dimension)

    return _on_local_shard(local, array)


def _on_local_shard(local: Callable, array: jax.Array) -> jax.Array:
    """Runs `local` with the axis `tensor` manual too, so that all axes are."""
    if set(MESH_AXES) <= set(manual_axes()):
        return local(array)
    partition = jax.typeof(array).sharding.spec
    return jax.shard_map(local, in_specs=partition, out_specs=partition, check_vma=False)(array)


def psum_replicated(gradient: jax.Array, partition: P) -> jax.Array:
    """The sum over devices with the same shard of a parameter. For `shard_map_over_data`."""
    split = set(sum((axes if isinstance(axes, tuple) else (axes,) for axes in partition), ()))
    axes = tuple(axis for axis in DATA_AXES if axis not in split)
    return _on_local_shard(lambda part: jax.lax.psum(part, axes), gradient)


def all_gather_sequence(array: jax.Array) -> jax.Array:
    """Whole rows [B, T, ...] from the columns of all `context` devices, if rows are split."""
    if not _splits_time():
        return array
    return _on_local_shard(
        lambda part: jax.lax.all_gather(part, "context", axis=1, tiled=True), array
    )


def local_sequence(array: jax.Array) -> jax.Array:
    """This device's columns of whole rows [B, T, ...], if rows are split."""
    if not _splits_time():
        return array
    size = array.shape[1] // jax.lax.axis_size("context")
    first = jax.lax.axis_index("context") * size
    return jax.lax.dynamic_slice_in_dim(array, first, size, axis=1)


def _splits_time() -> bool:
    return "context" in manual_axes() and jax.lax.axis_size("context") > 1
