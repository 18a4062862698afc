"""The numbers of a plan, as frozen dataclasses and as JSON."""

import dataclasses
from typing import Any

GIB = 2**30
NOTICE = (
    "Times are bounds computed from the compiled program, not measurements: the compiler's "
    "estimate of cycles, counted steps of kernels, bytes over documented bandwidths."
)


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Bytes of HBM of one device."""

    kinds: dict[str, int]  # parameters, optimizer, ..., temporaries
    total: int  # 0 if unknown, because the program does not fit
    limit: int

    @property
    def spare(self) -> float:
        """The free share of the limit."""
        return 1 - self.total / self.limit


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind along the same mesh axes, of one device and step."""

    kind: str
    axes: str
    count: float
    bytes: float  # of the gathered, reduced or scattered arrays
    sent: float  # bytes that a device must send
    seconds: float  # at the links' bandwidth
    is_beside: bool  # other work runs at the same time


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one run of the program on one device."""

    operations: float  # by the compiler's estimate of cycles
    kernels: float  # by counted cycles: attention, norms and rotation
    waits: float  # nothing runs but the network
    network: float  # all collectives, one after the other
    memory: float  # bytes moved in HBM, over its bandwidth
    products: float  # FLOPs of executed matrix products, kernels included, over the peak
    by_kind: dict[str, float]  # of operations
    by_part: dict[str, float]
    by_phase: dict[str, float]

    @property
    def compute(self) -> float:
        return self.operations + self.kernels

    @property
    def step(self) -> float:
        """The bound: a step takes no less, by the compiler's own estimate."""
        return max(self.compute + self.waits, self.network, self.memory)

    @property
    def roofline(self) -> float:
        """The least time of the same work at the hardware's peaks."""
        return max(self.products, self.network, self.memory)

    @property
    def bound_by(self) -> str:
        """The resource that sets the roofline: products, memory or network."""
        return max(("products", "memory", "network"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Plan:
    """One program on one slice."""

    name: str  # of the config
    program: str  # train, prefill or decode
    topology: str
    chip: str
    devices: int
    mesh: str  # sizes of the axes that are not 1
    settings: dict[str, Any]  # rows, length, remat, ...
    memory: MemoryUse
    problem: str = ""  # why the program does not fit; all below is then empty
    advice: str = ""  # what to change
    tokens: float = 0.0  # of one device and step, without padding
    model_flops: float = 0.0  # of one device and step, that the model needs
    executed_flops: float = 0.0  # of matrix products in the program, without kernels
    hbm_bytes: float = 0.0
    times: Times | None = None
    mfu: float = 0.0  # bound
    mfu_compute: float = 0.0  # bound without waits for the network
    traffic: tuple[Traffic, ...] = ()
    all_reduced: float = 0.0  # bytes of all-reduces over the axes that split the batch
    largest_all_gather: tuple[int, str] = (0, "")  # bytes, and the array
    operations: tuple[tuple[str, float, float], ...] = ()  # the longest: name, runs, seconds
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()  # each one a failure
    compile_seconds: float = 0.0
    is_cached: bool = False

    @property
    def tokens_per_second(self) -> float:
        """A bound of the tokens per second of one device."""
        return self.tokens / self.times.step if self.times else 0.0

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        values["memory"]["spare"] = self.memory.spare
        if self.times:
            values["times"] |= {
                name: getattr(self.times, name)
                for name in ("compute", "step", "roofline", "bound_by")
            }
            values["tokens_per_second"] = self.tokens_per_second
        return values | {"notice": NOTICE}


def from_json(values: dict[str, Any]) -> Plan:
    """The plan that `to_json` wrote."""

    def built(kind, given):
        names = {field.name for field in dataclasses.fields(kind)}
        return kind(**{name: value for name, value in given.items() if name in names})

    values = dict(values) | {"memory": built(MemoryUse, values["memory"])}
    if values["times"]:
        values["times"] = built(Times, values["times"])
    values["traffic"] = tuple(built(Traffic, row) for row in values["traffic"])
    values["largest_all_gather"] = tuple(values["largest_all_gather"])
    values["warnings"] = tuple(values["warnings"])
    values["operations"] = tuple(tuple(one) for one in values["operations"])
    return built(Plan, values)
