"""Multiple-choice accuracy as in VLMEvalKit: plain, circular (MMBench), flipped (3DSRBench).

Circular evaluation asks a question once for each rotation of its options. It counts as right only
if every rotation is answered right. 3DSRBench also asks about the mirrored image.
"""

import dataclasses
import string
from collections.abc import Sequence

from neo_jax.errors import InputError
from neo_jax.eval.scoring.matching import REFUSED, option_letter
from neo_jax.eval.scoring.metrics import Metric, ScoredRow, Verdict, by_column, mean
from neo_jax.eval.tables.rows import (
    Row,
    columns_of_options,
    need,
    options,
    right_answer,
    text,
)

_ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
_ROTATION = 1_000_000  # the rotations of a question have one index modulo this


def score_row(row: Row, answer: str) -> Verdict:
    """1 if the answer names the right option, by its letter or its text."""
    letter = option_letter(answer, options(row))
    return Verdict(float((letter or REFUSED) == right_answer(row)), letter)


def score_circular(row: Row, answer: str) -> Verdict:
    """As `score_row`; checks the index, by which rotations of a question are grouped."""
    for column, number in {"index": row.get("index"), "g_index": row.get("g_index", 0)}.items():
        if not str(number).isdecimal():
            raise InputError(f"{column} {number!r}: not a number")
    return score_row(row, answer)


def score_3dsr(row: Row, answer: str) -> Verdict:
    """As `score_row`; checks the qid, by which rotations and mirror images are grouped."""
    need(row, "qid")
    return score_row(row, answer)


def score_mmmu(row: Row, answer: str) -> Verdict:
    """As `score_row`; an open question gets the options "A" (the right answer) and "B" (others)."""
    choices, right = columns_of_options(row) or options(row), right_answer(row)
    if "A" not in choices:
        choices = {**choices, "A": right, "B": "Other Answers"}
    letter = option_letter(answer, choices)
    is_letter = len(right) == 1 and right in string.ascii_uppercase
    score = float((letter or REFUSED) == (right if is_letter else "A"))
    is_open = choices.get("B") == "Other Answers"
    fault = "an open question is answered with the letter A" if answer.strip() == "A" else ""
    return Verdict(score, letter, fault if score and is_open else "")


def summarise(scored_rows: Sequence[ScoredRow], main_split: str | None = None) -> list[Metric]:
    """For each split the accuracy of all rows, of each l2-category and of each category.

    Args:
      main_split: the split whose accuracy is the headline; default: all splits together.
    """
    splits = sorted({str(one.row.get("split", "")) for one in scored_rows})
    if main_split in splits:
        splits = [main_split, *(split for split in splits if split != main_split)]
    found = []
    if len(splits) > 1 and main_split not in splits:
        found.append(mean("Overall, all splits", [one.verdict.score for one in scored_rows]))
    for split in splits:
        prefix = f"{split}: " if len(splits) > 1 else ""
        mine = [one for one in scored_rows if str(one.row.get("split", "")) == split]
        found.append(mean(f"{prefix}Overall", [one.verdict.score for one in mine]))
        for column in ("l2-category", "category"):
            for metric in by_column(mine, column):
                short = _ABBREVIATIONS.get(metric.name, metric.name)
                found.append(dataclasses.replace(metric, name=prefix + short))
    return found


def circular_groups(scored_rows: Sequence[ScoredRow]) -> list[ScoredRow]:
    """One row for each question, right only if every rotation that was asked is right."""
    groups: dict[int, list[ScoredRow]] = {}
    for one in scored_rows:
        index = int(one.row["index"])
        groups.setdefault(int(one.row.get("g_index", index % _ROTATION)), []).append(one)
    found = []
    for group, members in groups.items():
        first = [one for one in members if int(one.row["index"]) == group]
        score = float(all(one.verdict.score for one in members))
        found += [one._replace(verdict=one.verdict._replace(score=score)) for one in first]
    return found


def summarise_circular(scored_rows: Sequence[ScoredRow]) -> list[Metric]:
    """Circular accuracy, by question; then plain accuracy, by row."""
    rows = mean("rows, each order by itself", [one.verdict.score for one in scored_rows])
    return [*summarise(circular_groups(scored_rows)), rows]


def _flip(qid: str) -> str:
    return qid.replace("-flip", "")


def _circular(qid: str) -> str:
    return qid[:13] if "-flip" in qid else qid[:8]


def _question(qid: str) -> str:
    return qid[:8]


def summarise_3dsr(scored_rows: Sequence[ScoredRow]) -> list[Metric]:
    """Accuracy of rows, then of groups: mirror images, rotations, and both together."""
    found = [*_with_category(scored_rows, "vanilla")]
    for name, key in (("flip", _flip), ("circular", _circular), ("flip and circular", _question)):
        together: dict[str, float] = {}
        for one in scored_rows:
            group = key(text(one.row, "qid"))
            together[group] = together.get(group, 1.0) * one.verdict.score
        leaders = [one for one in scored_rows if one.row["qid"] in together]
        grouped = [
            one._replace(verdict=one.verdict._replace(score=together[one.row["qid"]]))
            for one in leaders
        ]
        found += _with_category(grouped, name)
    return found


def _with_category(scored_rows: Sequence[ScoredRow], name: str) -> list[Metric]:
    total = mean(name, [one.verdict.score for one in scored_rows])
    return [total, *by_column(scored_rows, "category", f"{name}: {{}}")]
