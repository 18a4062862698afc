"""The report of a run: report.json, report.md, report.html and, with matplotlib, plots.

All of it comes from the folders of predictions, so `--score-only` can write it again.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from neo_jax.eval import page, plots
from neo_jax.eval.predictions import write_atomic
from neo_jax.eval.score_predictions import ScoredBenchmark

_SIZES = ("2B", "9B")


def write(scored: Sequence[ScoredBenchmark], out: Path) -> None:
    """Writes the report into `out`."""
    parts = [describe(one) for one in scored]
    write_atomic(out / "report.json", json.dumps({"benchmarks": parts}, indent=2) + "\n")
    figures = plots.draw(parts, out / "plots")
    write_atomic(out / "report.md", "\n".join(_markdown(parts, figures)) + "\n")
    write_atomic(out / "report.html", page.render(scored, out))


def describe(one: ScoredBenchmark) -> dict[str, Any]:
    """The entry of a benchmark in report.json."""
    usages = [answer["usage"] for answer in one.answers if "error" not in answer]
    finished = collections.Counter(answer["finish_reason"] for answer in one.answers)
    return {
        "name": one.benchmark.name,
        "title": one.benchmark.title,
        "note": one.benchmark.note,
        "rows": one.run_info["data"]["rows"],
        "scored": len(one.scored_rows),
        "metrics": [dataclasses.asdict(m) for m in one.metrics if math.isfinite(m.value)],
        "published": dict(zip(_SIZES, one.benchmark.published or (), strict=False)),
        "official_faults": one.faults,
        "without_official_faults": one.without_faults,
        "problems": one.problems,
        "finish_reasons": dict(finished),
        "lengths": {
            name: histogram([usage[f"{name}_tokens"] for usage in usages])
            for name in ("prompt", "completion")
        },
        "throughput": throughput(one, usages),
        "settings": one.run_info["settings"],
        "model": one.run_info["model"],
        "data": one.run_info["data"],
    }


def histogram(lengths: Sequence[int]) -> dict[str, int]:
    """Counts of lengths in bins of powers of two: 0, 1, 2 to 3, 4 to 7 and so on tokens."""
    counts = collections.Counter(length.bit_length() for length in lengths)
    return {
        f"{2**bits // 2}-{2**bits - 1}" if bits else "0": counts[bits] for bits in sorted(counts)
    }


def throughput(one: ScoredBenchmark, usages: Sequence[dict[str, int]]) -> dict[str, float] | None:
    """Rows and tokens per second, over all starts of the run that ended by themselves."""
    seconds = sum(time["seconds"] for time in one.times)
    if not seconds or not usages:
        return None
    hosts = max(time["hosts"] for time in one.times)
    # Hosts run at the same time, so their rates add up.
    rate = hosts * sum(time["answers"] for time in one.times) / seconds
    return {
        "hosts": hosts,
        "rows_per_second": rate,
        **{
            f"{name}_tokens_per_second": rate * _mean([usage[f"{name}_tokens"] for usage in usages])
            for name in ("prompt", "completion")
        },
    }


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)


def _markdown(parts: Sequence[dict[str, Any]], figures: Sequence[str]) -> Iterator[str]:
    yield "# Evaluation\n"
    yield "| | score | 95 % interval | rows | NEO-ov 2B | NEO-ov 9B | preset | rows/s |"
    yield "|---|---|---|---|---|---|---|---|"
    for part in parts:
        head = part["metrics"][0] if part["metrics"] else None
        speed = part["throughput"]
        cells = (
            part["title"],
            f"{head['value']:.2f}" if head else "",
            _interval(head) if head else "",
            f"{part['scored']} of {part['rows']}",
            *(f"{part['published'].get(size, '')}" for size in _SIZES),
            part["settings"]["preset"],
            f"{speed['rows_per_second']:.2f}" if speed else "",
        )
        yield f"| {' | '.join(map(_cell, cells))} |"
    yield "\nPublished scores are the paper's; answers there were sampled where the preset"
    yield "`official` samples. Open `report.html` for questions, images and answers."
    for figure in figures:
        yield f"\n![{Path(figure).stem}]({figure})"
    for part in parts:
        yield from _section(part)


def _interval(metric: dict[str, Any]) -> str:
    return f"{metric['low']:.2f} to {metric['high']:.2f}"


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _section(part: dict[str, Any]) -> Iterator[str]:
    yield f"\n## {part['title']}\n"
    if part["note"]:
        yield f"{part['note']}\n"
    if part["scored"] < part["rows"]:
        yield f"{part['scored']} of {part['rows']} rows are scored.\n"
    yield "| | value | 95 % interval | rows or groups |\n|---|---|---|---|"
    for metric in part["metrics"]:
        cells = (metric["name"], f"{metric['value']:.2f}", _interval(metric), metric["count"])
        yield f"| {' | '.join(map(_cell, map(str, cells)))} |"
    if part["official_faults"]:
        yield "\nRows that a fault of the official scoring decides, kept as it decides them:\n"
        for fault, count in part["official_faults"].items():
            yield f"- {count}: {fault}"
        yield f"\nWithout them the first number would be {part['without_official_faults']:.2f}."
    if part["problems"]:
        yield f"\n{len(part['problems'])} rows have problems (all are in report.json):\n"
        for problem in part["problems"][:20]:
            index = "" if problem["index"] is None else f" (index {problem['index']})"
            yield f"- row {problem['row']}{index}: {_cell(problem['problem'])}"
    for name, values in (
        ("Finish reasons", part["finish_reasons"]),
        ("Prompts by tokens", part["lengths"]["prompt"]),
        ("Answers by tokens", part["lengths"]["completion"]),
        ("Throughput", {k: round(v, 3) for k, v in (part["throughput"] or {}).items()}),
        ("Settings", part["settings"]),
        ("Model", part["model"]),
        ("Data", part["data"]),
    ):
        listed = ", ".join(f"{key} {_cell(value)}" for key, value in values.items())
        yield f"\n{name}: {listed or 'none'}."
