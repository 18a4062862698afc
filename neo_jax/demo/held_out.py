"""How well a model answers about drawn pictures that it has never seen, and what that is worth.

Beside each kind's accuracy stand two that need no eyes: always giving the commonest answer, and the
same model shown blank pictures.
"""

import collections
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from neo_jax.data import synthetic
from neo_jax.data.synthetic_records import blank
from neo_jax.infer.api import Pipeline
from neo_jax.infer.request import Request
from neo_jax.infer.sampling import Sampling

SEED = 3  # of held-out pictures
ANSWER = Sampling(max_new_tokens=12)


@dataclasses.dataclass(frozen=True)
class Asked:
    kind: str
    pictures: tuple[Image.Image, ...]
    question: str
    truth: str
    answer: str
    blind_answer: str

    @property
    def is_right(self) -> bool:
        return self.answer == self.truth


def ask_held_out(neo: Pipeline, per_kind: int) -> list[Asked]:
    """Asks the same questions, `per_kind` of each, about held-out pictures and blank ones."""
    drawn, requests, blind, blind_place = [], [], [], {}
    for picture_kind in synthetic.kinds():
        for number in range(per_kind):
            record = synthetic.draw_record(picture_kind, SEED, number, is_held_out=True)
            asked = {question.kind: question for question in reversed(record.questions)}
            wanted = [q for q in asked.values() if picture_kind == "one" or q.kind != "colour"]
            for question in wanted:
                drawn.append((question, record.pictures))
                requests.append(_request(record, record.pictures, question))
                if question.text not in blind_place:  # blank pictures are all alike
                    blind_place[question.text] = len(blind)
                    blanks = [blank(picture) for picture in record.pictures]
                    blind.append(_request(record, blanks, question))
    options = {"slots": 16, "max_length": 512, "prefill_budget": 256, "reuse_prefixes": False}
    answers = [result.text for result in neo.generate([*requests, *blind], **options)]
    seen, unseen = answers[: len(drawn)], answers[len(drawn) :]
    return [
        Asked(q.kind, tuple(pictures), q.text, q.answer, answer, unseen[blind_place[q.text]])
        for (q, pictures), answer in zip(drawn, seen, strict=True)
    ]


def scores(asked: Sequence[Asked]) -> dict[str, dict[str, float]]:
    """By kind: accuracy, that of the commonest answer, that of the blind copy, and how many."""
    table = {}
    for kind in dict.fromkeys(one.kind for one in asked):
        mine = [one for one in asked if one.kind == kind]
        (_, commonest), *_ = collections.Counter(one.truth for one in mine).most_common(1)
        table[kind] = {
            "accuracy": sum(one.is_right for one in mine) / len(mine),
            "majority": commonest / len(mine),
            "blind": sum(one.blind_answer == one.truth for one in mine) / len(mine),
            "questions": len(mine),
        }
    return table


def report(neo: Pipeline, workdir: str, per_kind: int = 100) -> dict[str, dict[str, float]]:
    """Asks, prints the table, and writes `held_out.json`, `answers.png`, `loss.png` and
    `example.png`, a picture to ask about."""
    asked = ask_held_out(neo, per_kind)
    table = scores(asked)
    folder = Path(workdir)
    (folder / "held_out.json").write_text(json.dumps(table, indent=2) + "\n")
    answer_sheet(asked, folder / "answers.png")
    asked[0].pictures[0].save(folder / "example.png")
    has_curve = loss_curve(folder)
    print(f"{'held out':10} {'accuracy':>9} {'majority':>9} {'blind':>9} {'questions':>10}")
    for kind, row in table.items():
        numbers = " ".join(f"{row[name]:>9.1%}" for name in ("accuracy", "majority", "blind"))
        print(f"{kind:10} {numbers} {row['questions']:>10}")
    print(f"see {folder / 'answers.png'}" + (f" and {folder / 'loss.png'}" if has_curve else ""))
    return table


def answer_sheet(asked: Sequence[Asked], path: Path, per_kind: int = 6) -> None:
    """A PNG of pictures, a row for each kind, with question, answer and whether it is right."""
    rows = collections.defaultdict(list)
    for one in asked:
        if len(rows[one.kind]) < per_kind:
            rows[one.kind].append(one)
    width, height = 230, synthetic.SIDE + 62
    sheet = Image.new("RGB", (width * per_kind, height * len(rows)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, shown in enumerate(rows.values()):
        for column, one in enumerate(shown):
            x, y = column * width + 8, row * height + 6
            for place, picture in enumerate(one.pictures):
                small = picture if len(one.pictures) < 3 else picture.resize((48, 48))
                sheet.paste(small, (x + place * (small.width + 4), y))
            question = one.question.replace(", seen", ",\nseen")
            pen.multiline_text((x, y + synthetic.SIDE + 2), question, "black", font, spacing=1)
            verdict = one.answer if one.is_right else f"{one.answer} ({one.truth})"
            colour = "green" if one.is_right else "red"
            lines = question.count("\n") + 1
            pen.text((x, y + synthetic.SIDE + 3 + 15 * lines), verdict, colour, font)
    sheet.save(path)


def loss_curve(folder: Path) -> bool:
    """Draws `metrics.jsonl` as `loss.png`; False where matplotlib is not installed."""
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


def _request(record: synthetic.Drawn, pictures, question: synthetic.Question) -> Request:
    if record.is_video:
        return Request(question.text, video=pictures, sampling=ANSWER)
    return Request("<image>" * len(pictures) + f"\n{question.text}", pictures, sampling=ANSWER)
