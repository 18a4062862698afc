"""Yes-or-no questions: F1 (POPE), consistency (HallusionBench), accuracy of pairs (MME)."""

from collections.abc import Sequence

import numpy as np

from neo_jax.errors import InputError
from neo_jax.eval.scoring.matching import yes_or_no
from neo_jax.eval.scoring.metrics import Metric, ScoredRow, Verdict, mean, of_sums
from neo_jax.eval.tables.rows import Row, need, right_answer, text

_PERCEPTION = (
    *("OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position"),
    *("posters", "scene"),
)


def score_row(row: Row, answer: str) -> Verdict:
    """1 if the answer says the right one of "Yes" and "No"."""
    parsed = yes_or_no(answer)
    return Verdict(float(parsed == right_answer(row)), None if parsed == "Unknown" else parsed)


def score_hallusion(row: Row, answer: str) -> Verdict:
    """As `score_row`; checks the index, which names the figure and the question of the row."""
    if len(str(row.get("index", "")).split("_")) < 6:
        raise InputError(f"index {row.get('index')!r}: not of six parts, such as VD_figure_x_3_1_0")
    return score_row(row, answer)


def score_mme(row: Row, answer: str) -> Verdict:
    """As `score_row`; checks that the row has a category, to which its points belong."""
    need(row, "category")
    return score_row(row, answer)


def summarise_pope(scored_rows: Sequence[ScoredRow]) -> list[Metric]:
    """F1 of "Yes", accuracy, precision and recall; a row counts once for each of its categories."""
    parts = [str(one.row.get("category", "")).split(",") for one in scored_rows]
    names = list(dict.fromkeys(name for mine in parts for name in mine if name))
    found = _f1("", [(one, len(mine)) for one, mine in zip(scored_rows, parts, strict=True)])
    for name in names:
        rows = [(one, mine.count(name)) for one, mine in zip(scored_rows, parts, strict=True)]
        found += _f1(f"{name}: ", [(one, times) for one, times in rows if times])
    return found


def _f1(prefix: str, rows: list[tuple[ScoredRow, int]]) -> list[Metric]:
    columns = np.zeros(
        (len(rows), 5)
    )  # true positives, false positives, false negatives, right, all
    for place, (one, times) in enumerate(rows):
        is_yes, answered_yes = right_answer(one.row) == "Yes", one.verdict.parsed == "Yes"
        kinds = (is_yes and answered_yes, answered_yes and not is_yes, is_yes and not answered_yes)
        columns[place] = times * np.array([*kinds, one.verdict.score, 1])
    count = sum(times for _, times in rows)

    def ratio(top: int, *parts: int):
        def formula(sums):
            total = sum(sums[..., part] for part in parts)
            return np.where(total > 0, sums[..., top], 0) / np.where(total > 0, total, 1)

        return formula

    return [
        of_sums(prefix + name, columns, formula, count=count)
        for name, formula in (
            ("F1", lambda sums: ratio(0, 0, 0, 1, 2)(sums) * 2),
            ("accuracy", ratio(3, 4)),
            ("precision", ratio(0, 0, 1)),
            ("recall", ratio(0, 0, 2)),
        )
    ]


def summarise_hallusion(scored_rows: Sequence[ScoredRow]) -> list[Metric]:
    """Accuracy by row (aAcc), by figure (fAcc) and by question (qAcc): overall and by category.

    A figure or question is right if all its rows are.
    """
    found = _consistency("", scored_rows)
    for column in ("category", "l2-category"):
        for name in dict.fromkeys(one.row[column] for one in scored_rows if column in one.row):
            mine = [one for one in scored_rows if one.row.get(column) == name]
            found += _consistency(f"{name}: ", mine)
    # The headline, as in the paper: the mean of the three overall accuracies.
    scores = [metric.value for metric in found[:3]]
    low, high = (float(np.mean([getattr(m, end) for m in found[:3]])) for end in ("low", "high"))
    return [Metric("average", float(np.mean(scores)), low, high, len(scored_rows)), *found]


def _consistency(prefix: str, scored_rows: Sequence[ScoredRow]) -> list[Metric]:
    figures: dict[tuple, list[float]] = {}
    questions: dict[tuple, list[float]] = {}
    for one in scored_rows:
        _, _, _, group, figure, question = str(one.row["index"]).split("_")[:6]
        kind = one.row.get("l2-category")
        figures.setdefault((kind, group, figure), []).append(one.verdict.score)
        questions.setdefault((kind, group, question), []).append(one.verdict.score)
    return [
        mean(f"{prefix}aAcc", [one.verdict.score for one in scored_rows]),
        mean(f"{prefix}fAcc", [float(all(scores)) for scores in figures.values()]),
        mean(f"{prefix}qAcc", [float(all(scores)) for scores in questions.values()]),
    ]


def summarise_mme(scored_rows: Sequence[ScoredRow]) -> list[Metric]:
    """Points: for each category the accuracy of rows plus that of pairs, in percent, summed."""
    groups: dict[str, dict[str, list[float]]] = {}
    for one in scored_rows:
        image = str(one.row.get("image_path") or one.row.get("question_id"))
        of_category = groups.setdefault(text(one.row, "category"), {})
        of_category.setdefault(image, []).append(one.verdict.score)
    names = sorted(groups)
    rows = []
    for place, name in enumerate(names):
        for scores in groups[name].values():
            row = np.zeros((len(names), 4))
            row[place] = sum(scores), len(scores), float(all(scores)), 1
            rows.append(row.ravel())

    def points(kept: Sequence[str]):
        places = [names.index(name) for name in kept]

        def formula(sums):
            parts = sums.reshape(*sums.shape[:-1], len(names), 4)[..., places, :]
            return (parts[..., 0] / parts[..., 1] + parts[..., 2] / parts[..., 3]).sum(axis=-1)

        return formula

    perception = [name for name in names if name in _PERCEPTION]
    reasoning = [name for name in names if name not in _PERCEPTION]
    totals = [("total points", names), ("perception", perception), ("reasoning", reasoning)]
    totals += [(name, [name]) for name in names]
    columns = np.array(rows)
    return [of_sums(name, columns, points(kept)) for name, kept in totals if kept]
