"""The mesh and the one table that says which axis of it splits which dimension.

There is always a mesh; a laptop is a 1x1x1 pod. Nothing outside this file names a mesh axis.

A mesh has sizes (data, fsdp, tensor) and, for long rows in training, a fourth, context, over which
parameters are split as well. Fsdp is two axes, because a pod's network is a torus: a gradient is
reduced over one ring after the other. Over both at once, the TPU compiler reduces it whole on every
device, for twice the traffic.

A training step is written for one device (`collectives.py`): only `tensor` is left to the types of
arrays there. Elsewhere all axes are in the types.
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
FSDP = ("fsdp", "fsdp_minor", "context")  # all that parameters are split over and rows may be
MESH_AXES = (*ROWS, "context", "tensor")
MESH_SIZES = ("data", "fsdp", "tensor", "context")  # what users give; the last may be left out

AXES = {
    "batch": ROWS,
    "time": "context",
    "embed": FSDP,
    "heads": "tensor",
    "ffw": "tensor",
    "vocab": "tensor",
}


def partition_spec(*names: str | None) -> P:
    """Partition of a parameter whose dimensions have these names; None is not split."""
    return P(*(None if name is None else AXES[name] for name in names))


def spec(*names: str | None) -> P:
    """The same for an array in the model, without the axes that are manual here."""
    return without_axes(partition_spec(*names), manual_axes())


def without_fsdp(partition: P) -> P:
    """The partition with the `embed` dimension replicated: what a layer computes with."""
    return without_axes(partition, FSDP)


def make_mesh(
    shape: Sequence[int] | None = None,
    devices: Sequence[jax.Device] | None = None,
    *,
    num_key_value_heads: int | None = None,
) -> Mesh:
    """A mesh of (data, fsdp, tensor) or (data, fsdp, tensor, context).

    Args:
      shape: the sizes. Default: as much `tensor` as this process's devices and
        `num_key_value_heads` allow, which is the fastest for one request at a time.
      devices: default: the first that `shape` needs.
      num_key_value_heads: of the model that will run; bounds the default `tensor` size.

    Raises:
      InputError: when there are too few devices.
    """
    if devices is None:
        devices = jax.local_devices() if shape is None else jax.devices()
    devices = list(devices)
    if shape is None:
        shape = (1, 1, math.gcd(len(devices), num_key_value_heads or 1))
    if (count := math.prod(_four(shape))) > len(devices):
        raise InputError(f"mesh {tuple(shape)} needs {count} devices, {len(devices)} are here")
    arranged = _arranged(shape, devices[:count])
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def _arranged(shape: Sequence[int], devices: list[jax.Device]) -> np.ndarray:
    """The devices so that axes lie along sides of their slice, and `data` along slices.

    Of fsdp's two sizes those nearest to a square are taken for which axes take whole sides, which
    are rings; where none do, as for a context of 2 on a square, axes may share a side.
    """
    data, fsdp, tensor, context = _four(shape)
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
        except (NotImplementedError, ValueError):  # these do not go along the sides
            continue
    raise InputError(f"mesh {tuple(shape)}: does not go along the sides of the slice")


def axis_sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """The sizes of MESH_AXES for those that a user gives; fsdp as near to a square as it goes.

    Raises:
      InputError: for sizes that are no sizes.
    """
    data, fsdp, tensor, context = _four(shape)
    minor = max(n for n in range(1, math.isqrt(fsdp) + 1) if fsdp % n == 0)
    return data, fsdp // minor, minor, context, tensor


def _four(shape: Sequence[int]) -> tuple[int, ...]:
    is_size = [isinstance(n, int) and n > 0 for n in shape]
    if len(shape) not in (3, 4) or not all(is_size):
        raise InputError(f"mesh {shape!r}: give the sizes of {MESH_SIZES}, each 1 or more")
    return (*shape, 1)[:4]


def describe(mesh: Mesh) -> str:
    """Its sizes as users give them."""
    sizes = mesh.shape
    given = (sizes["data"], sizes["fsdp"] * sizes["fsdp_minor"], sizes["tensor"])
    return "x".join(map(str, given if sizes["context"] == 1 else (*given, sizes["context"])))


def batch_rows(mesh: Mesh) -> int:
    """A batch has a multiple of this many rows."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def row_parts(mesh: Mesh) -> int:
    """Into how many parts rows are split, when they are trained on."""
    return mesh.shape[AXES["time"]]


def put(array, mesh: Mesh, *names: str | None) -> jax.Array:
    """Places a host array on the mesh, split by its dimensions' names."""
    return jax.device_put(array, NamedSharding(mesh, spec(*names)))


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which share of the rows of a batch this process feeds, of how many.

    Processes whose devices hold the same rows, split over `tensor`, feed the same share.

    Raises:
      InputError: when processes hold rows in common without holding all the same.
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
    """Mesh axes that the surrounding `shard_map` has taken out of the arrays' types."""
    return jax.sharding.get_abstract_mesh().manual_axes


def without_axes(partition: P, axes: Sequence[str]) -> P:
    """The partition without these mesh axes."""

    def kept(entry):
        if not isinstance(entry, tuple):
            return None if entry in axes else entry
        return tuple(axis for axis in entry if axis not in axes) or None

    return P(*map(kept, partition))
