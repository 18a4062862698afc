"""Scorers and metrics of the spatial benchmarks.

A letter in a free-form answer, mean relative accuracy (MRA) of a number, and chance-adjusted
accuracy (CAA).
"""

from collections.abc import Sequence

import numpy as np

from neo_jax.errors import InputError
from neo_jax.eval.scoring.matching import stated_letter, stated_number
from neo_jax.eval.scoring.metrics import (
    Metric,
    ScoredRow,
    Verdict,
    by_column,
    mean,
    mean_of_means,
    of_sums,
)
from neo_jax.eval.tables.rows import Row, listed, right_answer, text

# Of MRA: a relative error passes threshold t if it is at most 1 - t.
_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_NO_LETTERS = "neither the answer nor the truth names a letter A to F"


def score_letter(row: Row, answer: str) -> Verdict:
    """1 if the answer states the same letter as the right answer."""
    parsed, truth = stated_letter(answer), stated_letter(right_answer(row).strip())
    fault = _NO_LETTERS if parsed is truth is None else ""
    return Verdict(float(parsed == truth), parsed, fault)


def score_number(row: Row, answer: str) -> Verdict:
    """MRA of the number in the answer."""
    parsed = stated_number(answer)
    try:
        truth = float(right_answer(row))
    except (TypeError, ValueError):
        truth = float("nan")
    if parsed is None or truth != truth:
        return Verdict(0.0, parsed)
    return Verdict(mean_relative_accuracy(parsed, truth), parsed)


def mean_relative_accuracy(value: float, truth: float) -> float:
    """MRA: the share of the ten thresholds that the relative error passes."""
    error = abs((value - truth) / truth) if truth else abs(value)
    return float((error <= 1 - _THRESHOLDS).mean())


def summarise_site(scored_rows: Sequence[ScoredRow]) -> list[Metric]:
    """Accuracy and CAA, overall and by category.

    CAA counts the accuracy above that of guessing, which depends on the number of options.
    """
    found = _with_chance("overall", scored_rows)
    for name in dict.fromkeys(one.row["category"] for one in scored_rows if "category" in one.row):
        found += _with_chance(name, [one for one in scored_rows if one.row.get("category") == name])
    return found


def _with_chance(name: str, scored_rows: Sequence[ScoredRow]) -> list[Metric]:
    scores = [one.verdict.score for one in scored_rows]
    chances = [1 / (len(_candidates(one.row)) or 4) for one in scored_rows]

    def above_chance(sums):
        right, chance, count = sums[..., 0], sums[..., 1], sums[..., 2]
        return (right - chance) / (count - chance)

    columns = np.stack([scores, chances, np.ones(len(scores))], axis=1)
    return [
        mean(f"{name}, accuracy", scores),
        of_sums(f"{name}, CAA", columns, above_chance),
    ]


def _candidates(row: Row) -> list[str]:
    for column in ("candidates", "options"):
        if column in row:
            return listed(row[column])
    return []


_VSI_NUMBERS = (
    *("object_counting", "object_abs_distance", "object_size_estimation"),
    "room_size_estimation",
)
_VSI_DIRECTION = "object_rel_direction"
_VSI_LETTERS = (
    "object_rel_distance",
    *(f"{_VSI_DIRECTION}_{level}" for level in ("easy", "medium", "hard")),
    *("route_planning", "obj_appearance_order"),
)


def score_vsi(row: Row, answer: str) -> Verdict:
    """A number or a letter, by the type of the question."""
    kind = text(row, "question_type")
    if kind in _VSI_NUMBERS:
        return score_number(row, answer)
    if kind in _VSI_LETTERS:
        return score_letter(row, answer)
    raise InputError(f"question_type {kind!r}: use {', '.join(_VSI_NUMBERS + _VSI_LETTERS)}")


def summarise_vsi(scored_rows: Sequence[ScoredRow]) -> list[Metric]:
    """The mean over types of question; the three levels of direction together are one type."""
    kinds = [one.row["question_type"] for one in scored_rows]
    scores = [one.verdict.score for one in scored_rows]
    levels = {f"{_VSI_DIRECTION}_{level}" for level in ("easy", "medium", "hard")}
    are_joined = levels <= set(kinds)
    weights = {kind: 1 / 3 if are_joined and kind in levels else 1.0 for kind in kinds}
    found = [mean_of_means("overall", kinds, scores, weights)]
    for kind in (*_VSI_NUMBERS, *_VSI_LETTERS):
        if kind in kinds:
            found.append(mean(kind, [s for k, s in zip(kinds, scores, strict=True) if k == kind]))
        if kind == "object_rel_distance" and are_joined:
            mine = [(k, s) for k, s in zip(kinds, scores, strict=True) if k in levels]
            groups, values = zip(*mine, strict=True)
            found.append(mean_of_means(_VSI_DIRECTION, groups, values, weights))
    return found


_SPAR_LOW = tuple(
    f"{kind}_prediction_{pair}{views}"
    for kind in ("depth", "distance")
    for pair in ("oc", "oo")
    for views in ("", "_mv")
)
_VIEW_CHANGE = "view_change_infer"
_SPAR_MIDDLE = ("position_matching", "camera_motion_infer", _VIEW_CHANGE)
_SPAR_HIGH = (
    *("distance_infer_center_oo", "distance_infer_center_oo_mv", "obj_spatial_relation_oc_mv"),
    *("obj_spatial_relation_oo", "obj_spatial_relation_oo_mv", "spatial_imagination_oc"),
    *("spatial_imagination_oc_mv", "spatial_imagination_oo", "spatial_imagination_oo_mv"),
)
_SPAR_LEVELS = {"Low": _SPAR_LOW, "Middle": _SPAR_MIDDLE, "High": _SPAR_HIGH}
_MOVES = (
    *(("move_right", "move_left"), ("move_up", "move_down"), ("move_forward", "move_backward")),
    *(("rotate_right", "rotate_left"), ("rotate_up", "rotate_down")),
)


def score_spar(row: Row, answer: str) -> Verdict:
    """A number, a letter or a camera move, by the task of the row."""
    task = text(row, "task")
    if task in _SPAR_LOW:
        return score_number(row, answer)
    if task == _VIEW_CHANGE:
        moves, truth = _moves(answer), _moves(right_answer(row))
        scores = [mean_relative_accuracy(m, t) for m, t in zip(moves, truth, strict=True)]
        return Verdict(float(np.mean(scores)), answer)
    if task in _SPAR_MIDDLE + _SPAR_HIGH:
        return score_letter(row, answer)
    known = ", ".join((*_SPAR_LOW, *_SPAR_MIDDLE, *_SPAR_HIGH))
    raise InputError(f"task {task!r}: use {known}")


def _moves(instruction: str) -> list[float]:
    """The signed move along each axis of "move_right:0.3,rotate_left:30"; 0 if unreadable."""
    amounts: dict[str, float] = {}
    for part in instruction.split(","):
        name, _, amount = part.partition(":")
        try:
            amounts[name.strip()] = float(amount)
        except ValueError:
            continue
    return [amounts.get(forth, 0.0) - amounts.get(back, 0.0) for forth, back in _MOVES]


def summarise_spar(scored_rows: Sequence[ScoredRow]) -> list[Metric]:
    """The mean over all tasks, then over the tasks of each level, then each task."""
    tasks = [one.row["task"] for one in scored_rows]
    scores = [one.verdict.score for one in scored_rows]
    found = [mean_of_means("overall", tasks, scores, dict.fromkeys(tasks, 1.0))]
    for level, members in _SPAR_LEVELS.items():
        mine = [(task, s) for task, s in zip(tasks, scores, strict=True) if task in members]
        if mine:
            groups, values = zip(*mine, strict=True)
            found.append(mean_of_means(level, groups, values, dict.fromkeys(groups, 1.0)))
    return [*found, *by_column(scored_rows, "task")]
