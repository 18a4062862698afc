"""The mesh, and the table of which mesh axes split which dimension.

There is always a mesh; a laptop is a 1x1x1 pod. Only this file and `collectives.py` name mesh axes.

    size users give    mesh axes           splits
    data               data                rows of a batch
    fsdp               fsdp, fsdp_minor    rows of a batch, and parameters
    context            context             columns of long rows in training, and parameters
    tensor             tensor              heads, feed-forward channels, vocabulary

Fsdp is two axes because a pod's network is a torus: a gradient is reduced over one ring after the
other. Over both at once, XLA:TPU all-reduces it, for twice the traffic of a reduce-scatter.

In a training step, all axes but `tensor` are manual (`collectives.py`). Elsewhere all axes are
explicit, in the arrays' types.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from neo_jax.errors import InputError

ROWS = ("data", "fsdp", "fsdp_minor")
FSDP = ("fsdp", "fsdp_minor", "context")  # the axes that split parameters
MESH_AXES = (*ROWS, "context", "tensor")
MESH_SIZES = ("data", "fsdp", "tensor", "context")  # as users give them; context is optional

AXES = {
    "batch": ROWS,
    "time": "context",
    "embed": FSDP,
    "heads": "tensor",
    "ffw": "tensor",
    "vocab": "tensor",
}


def partition_spec(*names: str | None) -> P:
    """Partition of a parameter whose dimensions have these names; None: not split."""
    return P(*(None if name is None else AXES[name] for name in names))


def spec(*names: str | None) -> P:
    """Partition of an array in the model: `partition_spec` without the axes that are manual."""
    return without_axes(partition_spec(*names), manual_axes())


def without_fsdp(partition: P) -> P:
    """The partition of a parameter after its all-gather over fsdp."""
    return without_axes(partition, FSDP)


def make_mesh(
    shape: Sequence[int] | None = None,
    devices: Sequence[jax.Device] | None = None,
    *,
    num_key_value_heads: int | None = None,
) -> Mesh:
    """A mesh of (data, fsdp, tensor) or (data, fsdp, tensor, context).

    Args:
      shape: the sizes. Default: the largest `tensor` that this process's devices and
        `num_key_value_heads` allow, which is the fastest for one request at a time.
      devices: default: the first devices, as many as `shape` needs.
      num_key_value_heads: of the model that will run; bounds the default `tensor` size.

    Raises:
      InputError: if there are too few devices, or they cannot be arranged so.
    """
    if devices is None:
        devices = jax.local_devices() if shape is None else jax.devices()
    devices = list(devices)
    if shape is None:
        shape = (1, 1, math.gcd(len(devices), num_key_value_heads or 1))
    if (count := math.prod(_four_sizes(shape))) > len(devices):
        raise InputError(f"mesh {tuple(shape)} needs {count} devices, {len(devices)} are here")
    arranged = _arrange_devices(shape, devices[:count])
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def _arrange_devices(shape: Sequence[int], devices: list[jax.Device]) -> np.ndarray:
    """The devices as an array: mesh axes lie along sides of a slice, `data` along slices.

    A whole side of a slice is a ring. Fsdp's two sizes are the nearest to a square for which every
    axis has whole sides. If there are none, as for a context of 2 on a square, axes share a side.
    """
    data, fsdp, tensor, context = _four_sizes(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if data % slices:
        raise InputError(f"mesh {tuple(shape)}: data must be a multiple of the {slices} slices")
    pairs = [(fsdp // n, n) for n in range(1, fsdp + 1) if fsdp % n == 0]
    pairs.sort(key=lambda pair: (abs(pair[0] - pair[1]), pair[1]))
    for are_shared, (major, minor) in itertools.product((False, True), pairs):
        sizes = (data // slices, major, minor, context, tensor)
        options = {"devices": devices, "allow_split_physical_axes": are_shared}
        try:
            if slices == 1:
                return mesh_utils.create_device_mesh(sizes, **options)
            between = (slices, *[1] * (len(sizes) - 1))
            return mesh_utils.create_hybrid_device_mesh(sizes, between, **options)
        except (NotImplementedError, ValueError):  # these sizes do not fit the sides
            continue
    raise InputError(f"mesh {tuple(shape)}: does not go along the sides of the slice")


def axis_sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """The sizes of MESH_AXES for (data, fsdp, tensor[, context]).

    Fsdp is as near to a square as possible.

    Raises:
      InputError: if a size is not a positive integer.
    """
    data, fsdp, tensor, context = _four_sizes(shape)
    minor = max(n for n in range(1, math.isqrt(fsdp) + 1) if fsdp % n == 0)
    return data, fsdp // minor, minor, context, tensor


def _four_sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """(data, fsdp, tensor, context), with a context of 1 if it is left out."""
    is_size = [isinstance(n, int) and n > 0 for n in shape]
    if len(shape) not in (3, 4) or not all(is_size):
        raise InputError(f"mesh {shape!r}: give the sizes of {MESH_SIZES}, each 1 or more")
    return (*shape, 1)[:4]


def describe(mesh: Mesh) -> str:
    """The mesh's sizes as users give them, such as 1x8x2."""
    sizes = mesh.shape
    given = (sizes["data"], sizes["fsdp"] * sizes["fsdp_minor"], sizes["tensor"])
    return "x".join(map(str, given if sizes["context"] == 1 else (*given, sizes["context"])))


def batch_rows(mesh: Mesh) -> int:
    """Number of parts that the rows of a batch are split into; their number is a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def row_parts(mesh: Mesh) -> int:
    """Number of parts that each row is split into in training: the size of `context`."""
    return mesh.shape[AXES["time"]]


def put(array, mesh: Mesh, *names: str | None) -> jax.Array:
    """Places a host array on the mesh, split by its dimensions' names."""
    return jax.device_put(array, NamedSharding(mesh, spec(*names)))


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """(index, count) of the share of a batch's rows that this process feeds.

    Processes whose devices hold the same rows, split over `tensor`, feed the same share.

    Raises:
      InputError: if two processes have some but not all of their rows in common.
    """
    devices = mesh.devices.reshape(batch_rows(mesh), -1)
    rows: dict[int, set[int]] = {}
    for (row, _), device in np.ndenumerate(devices):
        rows.setdefault(device.process_index, set()).add(row)
    shares = sorted({tuple(sorted(held)) for held in rows.values()})
    if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) != len(devices):
        raise InputError(f"mesh {describe(mesh)}: hosts share rows unevenly; change its sizes")
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def manual_axes() -> tuple[str, ...]:
    """Mesh axes that the surrounding `shard_map` made manual, so not in the arrays' types."""
    return jax.sharding.get_abstract_mesh().manual_axes


def without_axes(partition: P, axes: Sequence[str]) -> P:
    """The partition without these mesh axes."""

    def kept(entry):
        if not isinstance(entry, tuple):
            return None if entry in axes else entry
        return tuple(axis for axis in entry if axis not in axes) or None

    return P(*map(kept, partition))
