"""Collectives of a training step, written by hand.

A training step is written for one device (`shard_map_over_data`), so that nothing moves between
devices but what this file moves:

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
EVEN_WIDTH = 2048  # TPUs all-reduce rows of odd widths; wide ones are padded to a multiple of this


def shard_map_over_data(local: Callable, in_specs, out_specs) -> Callable:
    """`local` run on each device's rows, columns and parts of parameters.

    Partitions are as for the whole arrays; what they say of `tensor` stays in the arrays' types.
    """
    ours = functools.partial(without_axes, axes=("tensor",))
    in_specs, out_specs = (
        jax.tree.map(ours, specs, is_leaf=lambda leaf: isinstance(leaf, P))
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
    """A device's part of a parameter made whole over fsdp; its gradient is `reduce_scatter`.

    Args:
      weight: in `shard_map_over_data`, a part of an array; elsewhere it is returned as it is.
      partition: of the whole array, as it is stored.
    """
    if FSDP not in tuple(partition) or "fsdp" not in manual_axes():
        return weight

    @jax.custom_vjp
    def whole(part):
        return _move_rows(_gather_rows, part, partition)

    whole.defvjp(lambda part: (whole(part), None), lambda _, dw: (reduce_scatter(dw, partition),))
    return whole(weight)


def reduce_scatter(whole: jax.Array, partition: P) -> jax.Array:
    """The sum over fsdp, of which each device keeps its part. For `shard_map_over_data`."""
    return _move_rows(_scatter_rows, whole, partition)


def _gather_rows(part: jax.Array) -> jax.Array:
    for axis in reversed(FSDP):
        part = jax.lax.all_gather(part, axis, axis=0, tiled=True)
    return part


def _scatter_rows(whole: jax.Array) -> jax.Array:
    columns = whole.shape[1]
    if columns > EVEN_WIDTH:
        whole = jnp.pad(whole, ((0, 0), (0, -columns % EVEN_WIDTH)))
    for axis in FSDP:
        whole = jax.lax.psum_scatter(whole, axis, scatter_dimension=0, tiled=True)
    return whole[:, :columns]


def _move_rows(move: Callable, array: jax.Array, partition: P) -> jax.Array:
    """`move` of the dimension that fsdp splits, as rows of a matrix that lie together.

    Of anything else a TPU would make an all-reduce.
    """
    dimension = tuple(partition).index(FSDP)

    def local(array):
        array = jnp.moveaxis(array, dimension, 0)
        rows = with_layout_constraint(array.reshape(array.shape[0], -1), Layout((0, 1)))
        moved = move(rows)
        return jnp.moveaxis(moved.reshape(-1, *array.shape[1:]), 0, dimension)

    return _on_local_shard(local, array)


def _on_local_shard(local: Callable, array: jax.Array) -> jax.Array:
    """`local` on each device's part of an array, whose types know of `tensor` alone."""
    if set(MESH_AXES) <= set(manual_axes()):
        return local(array)
    partition = jax.typeof(array).sharding.spec
    return jax.shard_map(local, in_specs=partition, out_specs=partition, check_vma=False)(array)


def psum_replicated(gradient: jax.Array, partition: P) -> jax.Array:
    """The sum over all devices that have the same part of a parameter, in `shard_map_over_data`."""
    split = set(sum((axes if isinstance(axes, tuple) else (axes,) for axes in partition), ()))
    axes = tuple(axis for axis in DATA_AXES if axis not in split)
    return _on_local_shard(lambda part: jax.lax.psum(part, axes), gradient)


def all_gather_sequence(array: jax.Array) -> jax.Array:
    """[B, T, ...] of all `context` devices side by side; as it is where rows are not split."""
    if not _splits_time():
        return array
    return _on_local_shard(
        lambda part: jax.lax.all_gather(part, "context", axis=1, tiled=True), array
    )


def local_sequence(array: jax.Array) -> jax.Array:
    """This device's part of the columns of a whole row [B, T, ...]."""
    if not _splits_time():
        return array
    size = array.shape[1] // jax.lax.axis_size("context")
    first = jax.lax.axis_index("context") * size
    return jax.lax.dynamic_slice_in_dim(array, first, size, axis=1)


def _splits_time() -> bool:
    return "context" in manual_axes() and jax.lax.axis_size("context") > 1
