"""The spatial benchmarks: letters in free-form answers, numbers by mean relative accuracy."""

from collections.abc import Sequence

import numpy as np

from neo_jax.errors import InputError
from neo_jax.eval.scoring.matching import stated_letter, stated_number
from neo_jax.eval.scoring.summary import (
    Metric,
    ScoredRow,
    Verdict,
    by_column,
    mean,
    mean_of_means,
    of_sums,
)
from neo_jax.eval.tables.rows import Row, listed, right_answer, text

# A relative error of at most one less each of these: 0.50, 0.55 and so on to 0.95.
_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_NO_LETTERS = "neither the answer nor the truth names a letter A to F"


def score_letter(row: Row, answer: str) -> Verdict:
    said, truth = stated_letter(answer), stated_letter(right_answer(row).strip())
    fault = _NO_LETTERS if said is truth is None else ""
    return Verdict(float(said == truth), said, fault)


def score_number(row: Row, answer: str) -> Verdict:
    """Mean relative accuracy: the share of thresholds that the relative error keeps."""
    said = stated_number(answer)
    try:
        truth = float(right_answer(row))
    except (TypeError, ValueError):
        truth = float("nan")
    if said is None or truth != truth:
        return Verdict(0.0, said)
    return Verdict(relative_accuracy(said, truth), said)


def relative_accuracy(said: float, truth: float) -> float:
    error = abs((said - truth) / truth) if truth else abs(said)
    return float((error <= 1 - _THRESHOLDS).mean())


def summarise_site(scored_rows: Sequence[ScoredRow]) -> list[Metric]:
    """Accuracy, and accuracy above chance: CAA, for questions of unlike numbers of options."""
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
    kind = text(row, "question_type")
    if kind in _VSI_NUMBERS:
        return score_number(row, answer)
    if kind in _VSI_LETTERS:
        return score_letter(row, answer)
    raise InputError(f"question_type {kind!r}: use {', '.join(_VSI_NUMBERS + _VSI_LETTERS)}")


def summarise_vsi(scored_rows: Sequence[ScoredRow]) -> list[Metric]:
    """The mean over kinds of question; the levels of direction are one kind, if all are there."""
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
    task = text(row, "task")
    if task in _SPAR_LOW:
        return score_number(row, answer)
    if task == _VIEW_CHANGE:
        said, truth = _moves(answer), _moves(right_answer(row))
        scores = [relative_accuracy(s, t) for s, t in zip(said, truth, strict=True)]
        return Verdict(float(np.mean(scores)), answer)
    if task in _SPAR_MIDDLE + _SPAR_HIGH:
        return score_letter(row, answer)
    known = ", ".join((*_SPAR_LOW, *_SPAR_MIDDLE, *_SPAR_HIGH))
    raise InputError(f"task {task!r}: use {known}")


def _moves(instruction: str) -> list[float]:
    """The way along each axis of "move_right:0.3,rotate_left:30"; what cannot be read is 0."""
    said: dict[str, float] = {}
    for part in instruction.split(","):
        name, _, amount = part.partition(":")
        try:
            said[name.strip()] = float(amount)
        except ValueError:
            continue
    return [said.get(forth, 0.0) - said.get(back, 0.0) for forth, back in _MOVES]


def summarise_spar(scored_rows: Sequence[ScoredRow]) -> list[Metric]:
    """The mean over tasks: of all, and of each level; then each task."""
    tasks = [one.row["task"] for one in scored_rows]
    scores = [one.verdict.score for one in scored_rows]
    found = [mean_of_means("overall", tasks, scores, dict.fromkeys(tasks, 1.0))]
    for level, members in _SPAR_LEVELS.items():
        mine = [(task, s) for task, s in zip(tasks, scores, strict=True) if task in members]
        if mine:
            groups, values = zip(*mine, strict=True)
            found.append(mean_of_means(level, groups, values, dict.fromkeys(groups, 1.0)))
    return [*found, *by_column(scored_rows, "task")]
