"""PNG plots of a report: scores beside the published ones, and how long answers are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(parts: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """Draws what `report.describe` gave; names of the files from the folder above.

    None where matplotlib, the extra [plots], is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    shown = [part for part in parts if part["metrics"]]
    if shown:
        figure = Figure(figsize=(7, 1 + 0.45 * len(shown)), layout="constrained")
        _scores(figure.subplots(), shown)
        figure.savefig(folder / "scores.png", dpi=120)
        found.append(f"{folder.name}/scores.png")
    for part in shown:
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _categories(left, part)
        _lengths(right, part)
        figure.savefig(folder / f"{part['name']}.png", dpi=120)
        found.append(f"{folder.name}/{part['name']}.png")
    return found


def _scores(axes: Any, parts: Sequence[dict[str, Any]]) -> None:
    for place, part in enumerate(parts):
        head = part["metrics"][0]
        axes.plot([head["low"], head["high"]], [place, place], color="tab:blue", lw=3, alpha=0.4)
        axes.plot(head["value"], place, "o", color="tab:blue", label="here" if not place else None)
        for (size, value), marker in zip(part["published"].items(), "x+", strict=False):
            label = f"published {size}" if part is parts[0] else None
            axes.plot(value, place, marker, color="tab:gray", label=label)
    axes.set_yticks(range(len(parts)), [part["title"] for part in parts])
    axes.invert_yaxis()
    axes.set_xlabel("score, with 95 % interval")
    axes.legend(fontsize="small")


def _categories(axes: Any, part: dict[str, Any]) -> None:
    metrics = part["metrics"][:14]
    names = [metric["name"][:36] for metric in metrics]
    values = [metric["value"] for metric in metrics]
    axes.barh(range(len(metrics)), values, color="tab:blue")
    for place, metric in enumerate(metrics):
        axes.plot([metric["low"], metric["high"]], [place, place], color="black", lw=1)
    axes.set_yticks(range(len(metrics)), names, fontsize="x-small")
    axes.invert_yaxis()
    axes.set_title(part["title"], fontsize="medium")


def _lengths(axes: Any, part: dict[str, Any]) -> None:
    for name, colour in (("prompt", "tab:orange"), ("completion", "tab:green")):
        lengths = part["lengths"][name]
        starts = [int(bounds.split("-")[0]) for bounds in lengths]
        axes.plot(starts, list(lengths.values()), "o-", color=colour, label=f"{name} tokens")
    axes.set(xscale="symlog", xlabel="tokens, from", ylabel="rows")
    axes.legend(fontsize="x-small")
