"""Scorers and metrics of free-text answers.

ANLS (DocVQA), relaxed accuracy (ChartQA), VQA accuracy (TextVQA), containment (OCRBench).
"""

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from neo_jax.eval.scoring.metrics import Metric, ScoredRow, Verdict, by_column, mean, of_sums
from neo_jax.eval.scoring.normalise import one_line, vqa_answer
from neo_jax.eval.tables.rows import Row, listed, right_answer

_ANLS_THRESHOLD = 0.5
_TOLERANCE = 0.05  # of ChartQA's numbers
_AGREEING = 3  # annotators whose agreement gives a TextVQA answer full score
_FORMULAS = "Handwritten Mathematical Expression Recognition"


def score_anls(row: Row, answer: str) -> Verdict:
    """ANLS: 1 - edit distance / length, of the nearest right answer; 0 if that is below 0.5."""
    score = max((1 - _distance(truth, answer) for truth in _truths(row)), default=0.0)
    return Verdict(score if score >= _ANLS_THRESHOLD else 0.0, answer)


def _distance(truth: str, answer: str) -> float:
    # As officially: the lengths are of the texts before spaces are joined.
    length = max(len(truth.upper()), len(answer.upper()))
    return Levenshtein.distance(one_line(truth), one_line(answer)) / length if length else 0.0


def score_relaxed(row: Row, answer: str) -> Verdict:
    """Relaxed accuracy: numbers within 5 %, other texts equal but for their case."""
    answer = answer.strip()
    return Verdict(float(any(_agrees(truth, answer) for truth in _truths(row))), answer)


def _agrees(truth: str, answer: str) -> bool:
    target, given = _number(truth), _number(answer)
    if given is not None and target:
        return abs(given - target) / abs(target) <= _TOLERANCE
    return answer.lower() == truth.lower()


def _number(value: str) -> float | None:
    try:
        return float(value.rstrip("%")) / 100 if value.endswith("%") else float(value)
    except ValueError:
        return None


def score_vqa(row: Row, answer: str) -> Verdict:
    """VQA accuracy: min(1, agreeing annotators / 3), averaged over leaving out one of the ten."""
    parsed = vqa_answer(answer)
    truths = [vqa_answer(truth) for truth in _truths(row)]
    matches = truths.count(parsed)
    scores = [min(1, (matches - (truth == parsed)) / _AGREEING) for truth in truths]
    return Verdict(sum(scores) / max(1, len(scores)), parsed)


def score_ocrbench(row: Row, answer: str) -> Verdict:
    """1 if the answer contains a right answer, without case; of formulas, without spaces."""

    def normalised(value: str) -> str:
        value = value.strip().replace("\n", " ")
        is_formula = row.get("category") == _FORMULAS
        return value.replace(" ", "") if is_formula else value.lower()

    parsed = normalised(answer)
    return Verdict(float(any(normalised(truth) in parsed for truth in _truths(row))), parsed)


def _truths(row: Row) -> list[str]:
    return listed(right_answer(row))


def summarise(scored_rows: Sequence[ScoredRow]) -> list[Metric]:
    """The mean score of all rows, then of each split or, without splits, of each category."""
    total = mean("Overall", [one.verdict.score for one in scored_rows])
    has_splits = any("split" in one.row for one in scored_rows)
    return [total, *by_column(scored_rows, "split" if has_splits else "category")]


def summarise_ocrbench(scored_rows: Sequence[ScoredRow]) -> list[Metric]:
    """Points, at most 1000 for the whole benchmark, as published; then of each kind."""
    kinds: dict[str, list[float]] = {}
    for one in scored_rows:
        kind = str(one.row.get("category", ""))
        kind = "Text Recognition" if kind.endswith("Recognition") and kind != _FORMULAS else kind
        kinds.setdefault(kind, []).append(one.verdict.score)

    def points(name: str, scores: list[float], scale: float = 1.0) -> Metric:
        return of_sums(name, [[score] for score in scores], lambda sums: sums[..., 0], scale)

    scores = [one.verdict.score for one in scored_rows]
    return [
        points("Final Score Norm (points / 10)", scores, 0.1),
        points("Final Score (points)", scores),
        mean("rows that are right", scores),
        *(points(f"{kind} (points)", kinds[kind]) for kind in kinds),
    ]
