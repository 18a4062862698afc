"""Figures of the demo: a sheet of images with answers, and the loss curve, as PNG."""

import collections
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from neo_jax.data import synthetic
from neo_jax.demo.held_out import Answer


def draw_answers(answers: Sequence[Answer], path: Path, per_kind: int = 6) -> None:
    """Draws a row for each kind: images, each with its question and the answer.

    A right answer is green; a wrong one is red, with the right one in brackets.
    """
    rows = collections.defaultdict(list)
    for one in answers:
        if len(rows[one.kind]) < per_kind:
            rows[one.kind].append(one)
    width, height = 230, synthetic.SIDE + 62
    sheet = Image.new("RGB", (width * per_kind, height * len(rows)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, shown in enumerate(rows.values()):
        for column, one in enumerate(shown):
            x, y = column * width + 8, row * height + 6
            for place, image in enumerate(one.images):
                small = image if len(one.images) < 3 else image.resize((48, 48))
                sheet.paste(small, (x + place * (small.width + 4), y))
            question = one.question.replace(", seen", ",\nseen")
            pen.multiline_text((x, y + synthetic.SIDE + 2), question, "black", font, spacing=1)
            verdict = one.answer if one.is_right else f"{one.answer} ({one.truth})"
            colour = "green" if one.is_right else "red"
            lines = question.count("\n") + 1
            pen.text((x, y + synthetic.SIDE + 3 + 15 * lines), verdict, colour, font)
    sheet.save(path)


def draw_loss(folder: Path) -> bool:
    """Draws `metrics.jsonl` of a run as `loss.png`; False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, style in (("loss", "-"), ("held_out_loss", "o")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(folder / "loss.png")
    return True
