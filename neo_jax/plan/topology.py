"""A TPU slice that you have not rented: its devices and links, as the TPU compiler knows them."""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
import tempfile
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from neo_jax.errors import InputError
from neo_jax.plan.chips import Chip, find_chip
from neo_jax.sharding import make_mesh

# libtpu reads these when it is loaded: do not look for a TPU, allow several processes, and log only
# warnings and errors.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "1",
    "TPU_STDERR_LOG_LEVEL": "1",
    "TF_CPP_MIN_LOG_LEVEL": "1",
}
INSTALL = "pip install 'neo-ov-jax[plan]'"

# The cloud's names of slices, and their shapes. For v5p and v7x, the name counts cores.
PODS = {
    "v5e-16": "v5e:4x4",
    "v5e-64": "v5e:8x8",
    "v5e-256": "v5e:16x16",
    "v5p-64": "v5p:2x4x4",
    "v5p-128": "v5p:4x4x4",
    "v6e-16": "v6e:4x4",
    "v6e-64": "v6e:8x8",
    "v6e-256": "v6e:16x16",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice."""

    name: str  # such as "v5e:16x16"
    chip: Chip
    shape: tuple[int, ...]  # chips each way
    devices: tuple[jax.Device, ...]

    def mesh(self, sizes: tuple[int, ...]) -> Mesh:
        """A mesh of these sizes over the slice; -1 takes the remaining devices.

        Raises:
          InputError: if the product of the sizes is not the number of devices.
        """
        count = len(self.devices)
        known = math.prod(size for size in sizes if size != -1)
        if sizes.count(-1) > 1 or known < 1 or count % known:
            raise InputError(
                f"mesh {_format_sizes(sizes)}: does not divide the {count} devices of {self}"
            )
        sizes = tuple(count // known if size == -1 else size for size in sizes)
        if math.prod(sizes) != count:
            raise InputError(
                f"mesh {_format_sizes(sizes)} has {math.prod(sizes)} devices, {self} has {count}: "
                "use sizes whose product is that, or -1 for one of them"
            )
        return make_mesh(sizes, devices=self.devices)

    def bandwidth(self, devices: list[jax.Device]) -> float:
        """The bytes per second that each device of a group can send to the others.

        Each dimension along which the group extends adds two links of a chip if it is a ring, else
        one. A slice of three dimensions has rings if it consists of whole cubes; a slice of two
        dimensions has them along each side that is as long as a pod's.
        """
        places = np.array([device.coords for device in devices])
        links, is_ring = 0, [size % self.chip.ring == 0 for size in self.shape]
        if len(self.shape) == 3:
            is_ring = [all(is_ring)] * 3
        for along, size, closed in zip(places.T, self.shape, is_ring, strict=False):
            extent = len(set(along.tolist()))
            if extent > 1:
                links += 2 if extent == size and closed else 1
        # The devices of one chip exchange data through its memory.
        return links * self.chip.link_bandwidth if links else self.chip.hbm_bandwidth / 2

    def __str__(self) -> str:
        return self.name


@functools.cache
def find_topology(name: str) -> Topology:
    """Finds the slice with a name such as "v5e:16x16" or "v5e-256".

    Raises:
      InputError: if libtpu is missing or does not know the slice.
    """
    spelled = PODS.get(name, name)
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", spelled)
    if not found:
        raise InputError(
            f"topology {name!r}: write it as v5e:16x16, chips each way, or one of {', '.join(PODS)}"
        )
    chip = find_chip(found[1])
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(f"the TPU compiler is missing: {INSTALL}")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        with capture_stderr():  # libtpu complains that it finds no TPU
            described = topologies.get_topology_desc(f"{chip.spelling}:{found[2]}", platform="tpu")
    except Exception as error:  # of any type
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"topology {name!r}: unknown to the TPU compiler: {reason}") from error
    shape = tuple(int(size) for size in found[2].split("x"))
    return Topology(spelled, chip, shape, tuple(described.devices))


@contextlib.contextmanager
def capture_stderr() -> Iterator[list[str]]:
    """Captures what compiled code writes to standard error. The list is filled at the end."""
    lines: list[str] = []
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def parse_sizes(text: str) -> tuple[int, ...]:
    """ "1x256x1" -> (1, 256, 1).

    Raises:
      InputError: for anything else.
    """
    try:
        sizes = tuple(int(size) for size in text.split("x"))
    except ValueError:
        sizes = ()
    if len(sizes) not in (3, 4) or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"mesh {text!r}: write data x fsdp x tensor, such as 1x256x1")
    return sizes


def _format_sizes(sizes: tuple[int, ...]) -> str:
    """(1, 256, 1) -> "1x256x1"."""
    return "x".join(map(str, sizes))
