"""Formats plans as text tables."""

from collections.abc import Iterator, Sequence

from neo_jax.plan.result import GIB, NOTICE, Plan

LEAST_SPARE = 0.08  # the share of memory to leave for other programs and fragmentation
_WIDTH = 34


def table(plan: Plan) -> str:
    """The table of one plan."""
    return "\n".join([*_head(plan), *_memory(plan), *_body(plan), "", NOTICE])


def ranking(plans: Sequence[Plan]) -> str:
    """A table of plans of one config, fastest first; those that do not fit come last."""
    lines = [f"{'mesh':28}{'remat':14}{'micro':>6}{'GiB':>8}{'spare':>7}{'MFU':>7}{'tokens/s':>10}"]
    for plan in sorted(plans, key=lambda plan: -plan.tokens_per_second):
        settings, memory = plan.settings, plan.memory
        lead = f"{plan.mesh:28}{settings['remat']:14}{settings['micro_batches']:>6}"
        if plan.problem:
            lines.append(f"{lead}  {plan.problem}")
            continue
        lines.append(
            f"{lead}{memory.total / GIB:>8.2f}{memory.spare:>7.0%}{plan.mfu:>7.1%}"
            f"{plan.tokens_per_second:>10,.0f}"
        )
    return "\n".join([*lines, "", NOTICE])


def _head(plan: Plan) -> Iterator[str]:
    yield f"{plan.name}: {plan.program} on {plan.topology}, {plan.devices} devices as {plan.mesh}"
    yield ", ".join(f"{name} {value}" for name, value in plan.settings.items())
    how = "read from the cache; it took" if plan.is_cached else "took"
    yield f"compiling {how} {plan.compile_seconds:.0f} s"


def _memory(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    yield f"\nmemory of a device{'':{_WIDTH - 18}}     GiB"
    for kind, size in memory.kinds.items():
        yield _line(kind, f"{size / GIB:.3f}")
    if plan.problem:
        yield _line("limit", f"{memory.limit / GIB:.2f}")
        yield f"DOES NOT FIT: {plan.problem}\ntry {plan.advice}"
        return
    yield _line("together", f"{memory.total / GIB:.3f}")
    few = f"; less than {LEAST_SPARE:.0%}" if memory.spare < LEAST_SPARE else ""
    yield _line("limit", f"{memory.limit / GIB:.2f}", f"{memory.spare:.1%} to spare{few}")


def _body(plan: Plan) -> Iterator[str]:
    times = plan.times
    if times is None:
        yield from _failures(plan)
        return
    yield "\nwork of a device and step"
    if plan.model_flops:
        yield _line("model FLOPs", f"{plan.model_flops:.3e}")
    yield _line("products in the program", f"{plan.executed_flops:.3e}", "FLOPs, without kernels")
    yield _line("moved in HBM", f"{plan.hbm_bytes / 1e9:.1f}", "GB, as operands and results say")
    yield f"\n{'collective':22}{'along':22}{'count':>7}{'GB':>9}{'GB sent':>9}{'ms':>8}"
    for row in plan.traffic:
        beside = "" if row.is_beside else "  waited for"
        yield (
            f"{row.kind:22}{row.axes:22}{row.count:>7.0f}{row.bytes / 1e9:>9.3f}"
            f"{row.sent / 1e9:>9.3f}{1e3 * row.seconds:>8.1f}{beside}"
        )
    yield _line("all-reduced over the batch", f"{plan.all_reduced / 1e9:.3f}", "GB")
    size, what = plan.largest_all_gather
    yield _line("largest all-gather", f"{size / 1e6:.1f}", f"MB {what}")
    yield f"\ntime of a step{'':{_WIDTH - 14}}      ms"
    for title, parts in (("", times.by_kind), ("of: ", times.by_part), ("of: ", times.by_phase)):
        for name, seconds in parts.items():
            yield _line(f"  {title}{name}", f"{1e3 * seconds:.1f}")
        if not title:
            yield _line("  kernels", f"{1e3 * times.kernels:.1f}")
            yield _line("  waits for the network", f"{1e3 * times.waits:.1f}")
    yield _line("bound of the program", f"{1e3 * times.step:.1f}")
    yield _line("roofline of its work", f"{1e3 * times.roofline:.1f}", f"bound by {times.bound_by}")
    yield _line("all collectives, in a row", f"{1e3 * times.network:.1f}")
    if plan.mfu:
        yield _line(
            "MFU, at most", f"{plan.mfu:.1%}", f"{plan.mfu_compute:.1%} without the network"
        )
    yield _line("tokens/s of a device, at most", f"{plan.tokens_per_second:,.0f}")
    yield "\nlongest operations"
    for name, runs, seconds in plan.operations:
        yield f"{1e3 * seconds:>8.1f} ms {runs:>5.0f} x {name}"
    yield ""
    for name, value in plan.notes.items():
        if value or value == 0.0:
            yield f"{name:{_WIDTH}} {_format(value)}"
    yield from _failures(plan)


def _failures(plan: Plan) -> Iterator[str]:
    for warning in plan.warnings:
        yield f"FAILURE: {warning}"


def _line(name: str, value: str, rest: str = "") -> str:
    return f"{name:{_WIDTH}}{value:>12}  {rest}".rstrip()


def _format(value) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if value < 100 else f"{value:,.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_format(number)}" for name, number in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
