"""PNG plots of a report: scores beside the published ones, categories, and token counts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(parts: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """Draws the parts that `report.describe` makes; returns paths relative to the folder above.

    An empty list where matplotlib, the extra [plots], is not installed.
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
        shown = {"here": (head["value"], "o")}
        for (size, value), marker in zip(part["published"].items(), "x+", strict=False):
            shown[f"published {size}"] = value, marker
        for name, (value, marker) in shown.items():
            is_new = name not in axes.get_legend_handles_labels()[1]
            colour = "tab:blue" if name == "here" else "tab:gray"
            axes.plot(value, place, marker, color=colour, label=name if is_new else None)
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
    lengths = part["lengths"]
    bins = sorted({*lengths["prompt"], *lengths["completion"]}, key=_lower_bound)
    for shift, name, label in ((-0.2, "prompt", "prompts"), (0.2, "completion", "answers")):
        places = [place + shift for place in range(len(bins))]
        axes.bar(places, [lengths[name].get(one, 0) for one in bins], 0.4, label=label)
    axes.set_xticks(range(len(bins)), bins, rotation=60, fontsize="x-small")
    axes.set(xlabel="tokens", ylabel="rows")
    axes.legend(fontsize="x-small")


def _lower_bound(bounds: str) -> int:
    return int(bounds.split("-")[0])
