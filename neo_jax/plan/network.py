"""Reads the collectives of a compiled program: kind, mesh axes, bytes and least time of each."""

import dataclasses
import math
import re

import numpy as np
from jax.sharding import Mesh

from neo_jax.plan.hlo import Computation, Instruction, Module
from neo_jax.plan.topology import Topology

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
STARTS, ENDS = "AsyncCollectiveStart", "AsyncCollectiveDone"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One run of a collective instruction."""

    kind: str
    axes: tuple[str, ...]  # of the mesh
    group: int  # how many devices take part together
    bytes: int  # of the whole gathered, reduced or scattered array, on each device
    largest: int  # bytes of its largest array
    array: str  # the type and shape of the largest array
    sent: float  # bytes that a device must send
    seconds: float  # at least
    op_name: str


class Network:
    """The links between the devices of a mesh, and what a collective costs on them."""

    def __init__(self, topology: Topology, mesh: Mesh):
        self._topology, self._mesh = topology, mesh
        self._devices = list(mesh.devices.flat)
        self._bandwidth: dict[tuple[int, ...], float] = {}

    def collective(self, one: Instruction, is_scattered: bool = False) -> Collective:
        """The collective of an instruction.

        Args:
          one: an instruction of one of KINDS, or its `-start`.
          is_scattered: for an all-reduce of which each device keeps only its shard.
        """
        kind = one.op.removesuffix("-start")
        arrays = one.arrays
        if one.op == "all-gather-start":  # operands, then results
            arrays = arrays[len(arrays) // 2 :]
        elif one.op == "collective-permute-start":
            arrays = arrays[1:2]
        group = members(one.attributes, len(self._devices))
        count = len(group)
        sizes = [array.bytes * (count if kind == "reduce-scatter" else 1) for array in arrays]
        total, others = sum(sizes), (count - 1) / count if count else 0
        kind = "reduce-scatter" if is_scattered else kind
        sent = total * others
        if kind == "all-reduce":
            sent *= 2
        elif kind in ("collective-permute", "collective-broadcast"):
            sent = total
        key = tuple(group)
        if key not in self._bandwidth:
            devices = [self._devices[member] for member in group]
            self._bandwidth[key] = self._topology.bandwidth(devices)
        seconds = sent / self._bandwidth[key]
        axes = self._axes(group)
        largest = max(arrays, key=lambda array: array.bytes)
        named = f"{largest.dtype}{list(largest.shape)}"
        return Collective(kind, axes, count, total, max(sizes), named, sent, seconds, one.op_name)

    def _axes(self, group: list[int]) -> tuple[str, ...]:
        """The mesh axes along which the devices of a group differ."""
        places = np.array(np.unravel_index(group, self._mesh.devices.shape))
        return tuple(
            name
            for name, along in zip(self._mesh.axis_names, places, strict=True)
            if len(set(along.tolist())) > 1
        )


def members(text: str, count: int) -> list[int]:
    """The devices of the first group, as numbers in a mesh of `count` devices."""
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text)
    if pairs:
        return sorted({int(pairs[1]), int(pairs[2])})
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    if listed:
        return [int(number) for number in listed[1].split(",")]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape, dims = (_numbers(iota[i]) for i in (1, 2))
        numbers = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            numbers = numbers.transpose(_numbers(iota[3]))
        return numbers.reshape(shape)[0].tolist()
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text)
    if named:
        return _named_mesh_group(named[1], named[2])
    return list(range(count))


def fused_collectives(module: Module, fusion: Instruction) -> tuple[list[Instruction], set[str]]:
    """The collectives in a fusion, nested ones included, and the targets of its custom calls."""
    found, targets = [], set()
    for one in all_instructions(module, module[fusion.called()]):
        if one.op in KINDS:
            found.append(one)
        elif one.op == "custom-call":
            targets.add(one.target)
    return found, targets


def async_channels(module: Module) -> set[str]:
    """The channels of the collectives that one fusion starts and another ends."""
    found = set()
    for computation in module.computations.values():
        if any(one.target == STARTS for one in computation.instructions if one.op == "custom-call"):
            found |= {channel(one) for one in computation.instructions if one.op in KINDS}
    return found


def all_instructions(module: Module, computation: Computation):
    """The instructions of a fused computation and of the computations that it calls."""
    for one in computation.instructions:
        yield one
        if one.op == "fusion":
            yield from all_instructions(module, module[one.called()])


def channel(one: Instruction) -> str:
    """The id that all fusions of one asynchronous collective share."""
    found = re.search(r'chain_id="(\d+)"', one.attributes)
    return found[1] if found else one.name


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _named_mesh_group(mesh: str, used: str) -> list[int]:
    """The first group of "'a'=16,'b'=16" over "'b'", or over a part of an axis, "'b':(2)4"."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    strides, stride = {}, 1
    for name in reversed(sizes):
        strides[name], stride = stride, stride * sizes[name]
    members = np.zeros(1, int)
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", used):
        size, step = sizes[name], strides[name]
        if part:
            step *= size // (int(before) * int(part))
            size = int(part)
        members = (members[:, None] + step * np.arange(size)).reshape(-1)
    return sorted(members.tolist())
