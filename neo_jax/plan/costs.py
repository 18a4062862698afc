"""Turns a compiled program into the numbers of a plan."""

from collections.abc import Iterable, Sequence

from jax.sharding import Mesh

from neo_jax.model_config import ModelConfig
from neo_jax.plan import hlo, timeline
from neo_jax.plan.chips import Chip
from neo_jax.plan.network import Collective, Network
from neo_jax.plan.packing import Row
from neo_jax.plan.result import Times, Traffic
from neo_jax.plan.timeline import Kernels, Totals
from neo_jax.plan.topology import Topology
from neo_jax.sharding import AXES
from neo_jax.train.run_metrics import flops_per_batch


def read(text: str, topology: Topology, mesh: Mesh, kernels: Kernels, **options) -> Totals:
    """Adds up the work in a program's final text. Options are those of `timeline.walk`."""
    network = Network(topology, mesh)
    return timeline.walk(hlo.parse(text), network, topology.chip.clock, kernels, **options)


def times(totals: Totals, chip: Chip) -> Times:
    """The times of a program's work on a chip."""

    def seconds(which: int) -> dict[str, float]:
        sums: dict[str, float] = {}
        for key, cycles in totals.cycles.items():
            sums[key[which]] = sums.get(key[which], 0.0) + cycles / chip.clock
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    return Times(
        operations=totals.all_cycles / chip.clock,
        kernels=totals.kernel_seconds,
        waits=totals.waits,
        network=sum(one.seconds * count for one, count, _ in totals.collectives),
        memory=totals.hbm_bytes / chip.hbm_bandwidth,
        products=(totals.flops + totals.kernel_flops) / chip.flops,
        by_kind=seconds(0),
        by_part=seconds(1),
        by_phase=seconds(2),
    )


def longest(totals: Totals, chip: Chip, most: int = 12) -> tuple[tuple[str, float, float], ...]:
    """The longest operations: name, number of runs, seconds of all runs."""
    ranked = sorted(totals.operations.items(), key=lambda item: -item[1][0])[:most]
    return tuple((name, runs, cycles / chip.clock) for name, (cycles, runs) in ranked)


def traffic(totals: Totals) -> tuple[Traffic, ...]:
    """Collectives by kind and axes, the longest first."""
    sums: dict[tuple[str, str, bool], list[float]] = {}
    for one, count, is_waited_for in totals.collectives:
        key = (one.kind, "+".join(one.axes) or "one device", not is_waited_for)
        entry = sums.setdefault(key, [0.0, 0.0, 0.0, 0.0])
        for i, value in enumerate((1, one.bytes, one.sent, one.seconds)):
            entry[i] += count * value
    rows = [
        Traffic(kind, axes, *entry, is_beside)  # type: ignore[arg-type]
        for (kind, axes, is_beside), entry in sums.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.seconds))


def all_reduced(totals: Totals) -> dict[str, float]:
    """Bytes of all-reduces over mesh axes that split the batch, by each one's largest array.

    Gradients of weights should be reduce-scattered instead, with half the traffic.
    """
    axes, found = set(axis_names("batch")), {}
    for one, count, _ in totals.collectives:
        if one.kind == "all-reduce" and axes & set(one.axes):
            found[one.array] = found.get(one.array, 0.0) + one.bytes * count
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def largest_all_gather(totals: Totals) -> tuple[int, str]:
    """The bytes of the largest all-gather, and its array."""
    gathers: Iterable[Collective] = (
        one for one, _, _ in totals.collectives if one.kind == "all-gather"
    )
    largest = max(gathers, key=lambda one: one.largest, default=None)
    return (largest.largest, f"{largest.array} {largest.op_name}") if largest else (0, "")


def model_flops(c: ModelConfig, trainable: Sequence[str], rows: Sequence[Row]) -> float:
    """FLOPs that training on rows needs, given the keys that tokens attend to. Padding needs none.

    Args:
      trainable: path rules; frozen weights have no gradients.
    """
    tokens = sum(row.tokens for row in rows)
    patches = 4 * sum(row.image_tokens for row in rows)
    return flops_per_batch(c, tokens, patches, sum(row.keys for row in rows), trainable)


def axis_names(dimension: str) -> tuple[str, ...]:
    """The mesh axes that split a dimension."""
    axes = AXES[dimension]
    return (axes,) if isinstance(axes, str) else tuple(axes)
