"""Walks a compiled program in the order in which a device runs it, and adds up its work and time.

Times are bounds, not measurements: the compiler's own estimate of the cycles of each operation,
counted cycles of our kernels, bytes over the bandwidth of links. The network works beside other
operations; the device waits only where a collective ends after them:

    device    start | other operations | wait | done
    network         | collective              |
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from neo_jax.plan import network as net
from neo_jax.plan import work
from neo_jax.plan.hlo import Computation, Instruction, Module

KERNEL = "tpu_custom_call"


class KernelWork(NamedTuple):
    """Seconds and FLOPs of one call of a kernel."""

    seconds: float
    flops: float = 0.0


# The work of a kernel's call; None for an unknown kernel.
Kernels = Callable[[Instruction, Computation], KernelWork | None]
# The share of runs in which each branch of a conditional is taken. None: always the quickest, since
# times are bounds.
Branches = Callable[[Instruction], Sequence[float] | None]


@dataclasses.dataclass
class Totals:
    """The work of one device in one run of the program."""

    cycles: dict[tuple[str, str, str], float]  # by kind of work, part of the model and phase
    # [cycles, runs] by operation; its name has its place in the model and the type of its result.
    operations: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    flops: float = 0.0  # of executed matrix products, without kernels
    hbm_bytes: float = 0.0
    kernel_seconds: float = 0.0
    kernel_flops: float = 0.0
    kernel_calls: dict[str, float] = dataclasses.field(default_factory=dict)
    waits: float = 0.0  # seconds in which nothing runs but the network
    # A collective, how often it runs, and whether the device waits for it.
    collectives: list[tuple[net.Collective, float, bool]] = dataclasses.field(default_factory=list)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)
    unknown_kernels: list[str] = dataclasses.field(default_factory=list)

    @property
    def all_cycles(self) -> float:
        return sum(self.cycles.values())

    def _count(self, name: str, cycles: float, runs: float) -> None:
        entry = self.operations.setdefault(name, [0.0, 0.0])
        entry[0] += cycles
        entry[1] += runs

    def add_operation(self, one: Instruction, kind: str, times: float) -> None:
        where = one.op_name.split("closed_call/")[-1] or one.name.rstrip(".0123456789")
        made = max(one.arrays, key=lambda array: array.bytes, default=None)
        shape = f" {made.dtype}{list(made.shape)}" if made else ""
        name = f"{work.phase(one.op_name)} {kind}: {where}{shape}"
        self._count(name, times * one.cycles, times)

    def add(self, other: "Totals") -> None:
        for field in dataclasses.fields(self):
            value = getattr(other, field.name)
            if field.name == "operations":
                for name, (cycles, runs) in value.items():
                    self._count(name, cycles, runs)
            elif isinstance(value, dict):
                mine = getattr(self, field.name)
                mine.update({key: mine.get(key, 0.0) + value[key] for key in value})
            else:
                setattr(self, field.name, getattr(self, field.name) + value)


@dataclasses.dataclass
class _Clock:
    """The time in one run of a computation: of the device, of the network, ends of collectives."""

    now: float = 0.0
    network: float = 0.0
    ends: dict[str, float] = dataclasses.field(default_factory=dict)

    def start(self, key: str, seconds: float) -> None:
        """Starts a collective; the network does one after the other."""
        self.network = max(self.network, self.now) + seconds
        self.ends[key] = self.network

    def wait(self, key: str) -> float:
        """Waits for the end of a collective. Returns the seconds of waiting."""
        waited = max(0.0, self.ends.pop(key, 0.0) - self.now)
        self.now += waited
        return waited


def walk(
    module: Module,
    network: net.Network,
    clock_rate: float,
    kernels: Kernels,
    branches: Branches = lambda one: None,
) -> Totals:
    """Adds up a program's work. A loop of data-dependent trip count counts once and is named."""
    totals = Totals(collections.defaultdict(float))
    _Walk(module, network, clock_rate, kernels, branches, totals).run(module[module.entry], 1.0)
    return totals


@dataclasses.dataclass
class _Walk:
    module: Module
    network: net.Network
    clock_rate: float
    kernels: Kernels
    branches: Branches
    totals: Totals

    def __post_init__(self):
        self._async_channels = net.async_channels(self.module)

    def run(self, where: Computation, times: float) -> float:
        """Adds up a computation that runs `times` times. Returns the seconds of one run."""
        clock = _Clock()
        for one in where.instructions:
            if one.op in work.FREE:
                continue
            self.totals.hbm_bytes += times * work.traffic(self.module, where, one)
            if one.op == "while":
                self._loop(where, one, times, clock)
            elif one.op in ("conditional", "call"):
                clock.now += self._call(one, times)
            elif one.op == "custom-call" and one.target == KERNEL:
                clock.now += self._kernel(where, one, times)
            elif not self._is_collective(one, times, clock):
                self._compute(where, one, times, clock)
        return clock.now

    def _loop(self, where: Computation, one: Instruction, times: float, clock: _Clock) -> None:
        trips = self.module.trips(one, where)
        if trips is None:
            self.totals.unknown_loops.append(one.op_name or one.name)
            trips = 1
        if trips:
            clock.now += trips * self.run(self.module[one.called("body")], times * trips)

    def _call(self, one: Instruction, times: float) -> float:
        if one.op == "call":
            return self.run(self.module[one.called("to_apply")], times)
        if shares := self.branches(one):
            taken = zip(work.branches(one), shares, strict=True)
            return sum(share * self.run(self.module[name], share * times) for name, share in taken)
        whole, found = self.totals, []
        for name in work.branches(one):
            self.totals = Totals(collections.defaultdict(float))
            found.append((self.run(self.module[name], times), self.totals))
        self.totals = whole
        seconds, quickest = min(found, key=lambda pair: pair[0])
        whole.add(quickest)
        return seconds

    def _kernel(self, where: Computation, one: Instruction, times: float) -> float:
        done = self.kernels(one, where)
        name = one.op_name or one.name
        if done is None:
            self.totals.unknown_kernels.append(name)
            return 0.0
        self.totals.kernel_seconds += times * done.seconds
        self.totals.kernel_flops += times * done.flops
        kernel = one.name.rstrip(".0123456789")
        self.totals.kernel_calls[kernel] = self.totals.kernel_calls.get(kernel, 0.0) + times
        return done.seconds

    def _compute(self, where, one: Instruction, times: float, clock: _Clock) -> None:
        key = (work.kind(self.module, one), work.part(one.op_name), work.phase(one.op_name))
        if one.cycles:
            self.totals.cycles[key] += times * one.cycles
            self.totals.add_operation(one, key[0], times)
            clock.now += one.cycles / self.clock_rate
        self.totals.flops += times * work.products(self.module, where, one)

    def _is_collective(self, one: Instruction, times: float, clock: _Clock) -> bool:
        """Handles a collective, its start or its end. Returns False if other work is left."""
        if one.op in net.KINDS:
            found = self._add(self.network.collective(one), times, True)
            clock.start(one.name, found.seconds)
            self._wait(one.name, times, clock)
            return True
        if one.op.endswith("-start") and one.op.removesuffix("-start") in net.KINDS:
            clock.start(one.name, self._add(self.network.collective(one), times, False).seconds)
            return True
        if one.op == "async-start":
            self._start_async(one, times, clock)
            return True
        if one.op.endswith("-done"):
            self._wait(one.operands[0], times, clock)
            return True
        return one.op == "fusion" and self._is_collective_fusion(one, times, clock)

    def _start_async(self, one: Instruction, times: float, clock: _Clock) -> None:
        seconds = 0.0
        for inner in net.all_instructions(self.module, self.module[one.called()]):
            if inner.op in net.KINDS:
                seconds += self._add(self.network.collective(inner), times, False).seconds
        clock.start(one.name, seconds)

    def _is_collective_fusion(self, one: Instruction, times: float, clock: _Clock) -> bool:
        """Handles collectives in a fusion. One may start in a fusion and end in another."""
        found, targets = net.fused_collectives(self.module, one)
        if not found:
            return False
        if net.STARTS in targets:
            for inner in found:
                collective = self._add(self.network.collective(inner), times, False)
                clock.start(net.channel(inner), collective.seconds)
        elif net.ENDS in targets:
            for inner in found:
                self._wait(net.channel(inner), times, clock)
        elif any(net.channel(inner) in self._async_channels for inner in found):
            return False  # one step of a collective, beside the fusion's own work
        else:
            is_scattered = "scatter" in one.called() or "scatter" in one.name
            for inner in found:
                is_part = is_scattered and inner.op == "all-reduce"
                self._add(collective := self.network.collective(inner, is_part), times, True)
                clock.start(inner.name, collective.seconds)
                self._wait(inner.name, times, clock)
        return not one.cycles

    def _add(self, collective: net.Collective, times: float, is_waited_for: bool):
        self.totals.collectives.append((collective, times, is_waited_for))
        return collective

    def _wait(self, key: str, times: float, clock: _Clock) -> None:
        self.totals.waits += times * clock.wait(key)
