"""The mesh and the one table that says which axis of it splits which dimension.

There is always a mesh; a laptop is a 1x1x1 pod. Nothing outside this file names a mesh axis.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from neo_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")

AXES = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "ffw": "tensor",
    "vocab": "tensor",
}


def spec(*names: str | None) -> P:
    """Partition of an array whose dimensions have these names; None is not split."""
    return P(*(None if name is None else AXES[name] for name in names))


def gathered(partition: P) -> P:
    """The same partition with the `embed` dimension whole: what a layer computes with."""
    return P(*(None if axis == AXES["embed"] else axis for axis in partition))


def make_mesh(
    shape: Sequence[int] | None = None,
    devices: Sequence[jax.Device] | None = None,
    *,
    num_key_value_heads: int | None = None,
) -> Mesh:
    """A mesh of (data, fsdp, tensor).

    Args:
      shape: three sizes. Default: as much `tensor` as the local devices and
        `num_key_value_heads` allow, which is the fastest for one request at a time.
      devices: default: the first that `shape` needs.
      num_key_value_heads: of the model that will run; bounds the default `tensor` size.

    Raises:
      InputError: when there are too few devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if shape is None:
        shape = (1, 1, math.gcd(len(devices), num_key_value_heads or 1))
    if len(shape) != len(MESH_AXES) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise InputError(f"mesh {shape!r}: give the sizes of {MESH_AXES}, each 1 or more")
    if math.prod(shape) > len(devices):
        raise InputError(
            f"mesh {tuple(shape)} needs {math.prod(shape)} devices, {len(devices)} are here"
        )
    return jax.make_mesh(tuple(shape), MESH_AXES, devices=devices[: math.prod(shape)])


def batch_rows(mesh: Mesh) -> int:
    """A batch has a multiple of this many rows."""
    return math.prod(mesh.shape[axis] for axis in AXES["batch"])


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
        raise InputError(f"mesh {dict(mesh.shape)}: hosts share rows unevenly; change its sizes")
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)
