"""Draws plans as bars: the parts of a device's memory and of a step's time."""

from collections.abc import Sequence

from neo_jax.data.record import require
from neo_jax.plan.result import GIB, NOTICE, Plan


def require_drawing(path: str) -> None:
    """Raises InputError without matplotlib."""
    require("matplotlib.figure", "neo-ov-jax[plots]", path)


def draw(plans: Sequence[Plan], path: str) -> None:
    """Writes a PNG: a bar of memory and a bar of time for each plan that fits.

    Raises:
      InputError: without matplotlib.
    """
    require_drawing(path)
    from matplotlib.figure import Figure

    shown = [plan for plan in plans if plan.times] or list(plans)
    figure = Figure(figsize=(13, 3.2 + 0.8 * len(shown)), layout="constrained")
    memory, time = figure.subplots(1, 2)
    labels = [f"{plan.program}, {plan.topology}\n{_settings(plan)}" for plan in shown]
    _bars(memory, labels, [{k: v / GIB for k, v in plan.memory.kinds.items()} for plan in shown])
    memory.set_xlabel("GiB of a device")
    for limit in {plan.memory.limit / GIB for plan in shown}:
        memory.axvline(limit, color="black", linestyle="--", label=f"limit {limit:.2f}")
    _legend(memory)
    _bars(time, labels, [_times(plan) for plan in shown])
    time.set_yticklabels([])
    time.set_xlabel("ms of a step, a bound")
    for place, plan in enumerate(shown):
        if plan.mfu:
            time.text(0, place + 0.42, f"MFU at most {plan.mfu:.1%}", fontsize="small", va="bottom")
    _legend(time)
    figure.suptitle(f"{shown[0].name}\n{NOTICE}", fontsize="small", wrap=True)
    figure.savefig(path, dpi=120, format="png")


def _settings(plan: Plan) -> str:
    wanted = ("remat", "micro_batches", "slots", "kv_dtype")
    parts = [f"{name} {plan.settings[name]}" for name in wanted if name in plan.settings]
    return ", ".join([plan.mesh, *parts])


def _times(plan: Plan) -> dict[str, float]:
    if not plan.times:
        return {}
    parts = {f"{name}": 1e3 * seconds for name, seconds in plan.times.by_kind.items()}
    parts["kernels"] = 1e3 * plan.times.kernels
    parts["waits for the network"] = 1e3 * plan.times.waits
    return parts


def _bars(axes, labels: list[str], parts: list[dict[str, float]]) -> None:
    names = list(dict.fromkeys(name for one in parts for name in one))
    left = [0.0] * len(labels)
    for name in names:
        widths = [one.get(name, 0.0) for one in parts]
        axes.barh(range(len(labels)), widths, left=left, height=0.6, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(labels)), labels, fontsize="small")


def _legend(axes) -> None:
    axes.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.25))
