"""Metrics of a benchmark, with 95 % confidence intervals, from the verdicts on its rows."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from neo_jax.eval.tables.rows import Row

_Z = 1.959964  # of 95 %
_RESAMPLES = 1000
_SEED = 0


class Verdict(NamedTuple):
    """A scorer's result for one row."""

    score: float  # 0 to 1
    parsed: Any = None  # the letter, number or text found in the answer; None: nothing
    fault: str = ""  # the fault of the official scorer that decides this score, if any


class ScoredRow(NamedTuple):
    """A row, the model's answer ("nan" if empty) and the verdict on it."""

    row: Row
    answer: str
    verdict: Verdict


@dataclasses.dataclass(frozen=True)
class Metric:
    """One reported number, in percent unless its name says otherwise."""

    name: str
    value: float
    low: float  # 95 % confidence interval
    high: float
    count: int  # rows or groups that it counts


def mean(name: str, scores: Sequence[float], scale: float = 100.0) -> Metric:
    """The mean of independent scores.

    The interval is Wilson's if all scores are 0 or 1, else a bootstrap over rows.
    """
    values = np.asarray(scores, np.float64)
    if not len(values):
        return Metric(name, math.nan, math.nan, math.nan, 0)
    if not np.isin(values, (0, 1)).all():
        columns = np.stack([values, np.ones_like(values)], axis=1)
        return of_sums(name, columns, lambda sums: sums[..., 0] / sums[..., 1], scale)
    n, p = len(values), values.mean()
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Metric(name, scale * p, scale * low, scale * high, n)


def of_sums(
    name: str,
    columns_nk: np.ndarray,
    formula: Callable[[np.ndarray], np.ndarray],
    scale: float = 100.0,
    count: int | None = None,
) -> Metric:
    """A metric that is a formula of sums over rows, such as F1; its interval is a bootstrap.

    Args:
      columns_nk: [n, k], the terms of each row, or of each group of rows that belong together.
      formula: sums [..., k] to values [...].
      count: the rows or groups that it counts; default: n.
    """
    columns = np.asarray(columns_nk, np.float64)
    n = len(columns)
    if not n:
        return Metric(name, math.nan, math.nan, math.nan, 0)
    rng = np.random.default_rng(_SEED)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(formula(columns.sum(axis=0)))
        draws = [columns[rng.integers(0, n, n)].sum(axis=0) for _ in range(_RESAMPLES)]
        values = formula(np.stack(draws))
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, [2.5, 97.5]).tolist() if len(values) else (value, value)
    return Metric(name, scale * value, scale * low, scale * high, n if count is None else count)


def mean_of_means(
    name: str, groups: Sequence[Any], scores: Sequence[float], weights: dict[Any, float]
) -> Metric:
    """The weighted mean of the groups' means; a resample without a group leaves that group out."""
    names = list(dict.fromkeys(groups))
    columns = np.zeros((len(groups), 2 * len(names)))
    for row, (group, score) in enumerate(zip(groups, scores, strict=True)):
        place = 2 * names.index(group)
        columns[row, place : place + 2] = score, 1
    weight = np.array([weights[group] for group in names])

    def formula(sums):
        has_rows = sums[..., 1::2] > 0
        means = sums[..., 0::2] / np.where(has_rows, sums[..., 1::2], 1)
        return (means * weight).sum(axis=-1) / (has_rows * weight).sum(axis=-1)

    return of_sums(name, columns, formula)


def by_column(scored_rows: Sequence[ScoredRow], column: str, name: str = "{}") -> list[Metric]:
    """The mean score for each value of a column, in sorted order; `name` formats the value."""
    found: dict[str, list[float]] = {}
    for one in scored_rows:
        if column in one.row:
            found.setdefault(str(one.row[column]), []).append(one.verdict.score)
    return [mean(name.format(value), found[value]) for value in sorted(found)]


def overall(
    scored_rows: Sequence[ScoredRow], *columns: str, first: str = "overall"
) -> list[Metric]:
    """The mean score of all rows, then for each value of some columns."""
    total = mean(first, [one.verdict.score for one in scored_rows])
    return [total, *(metric for column in columns for metric in by_column(scored_rows, column))]
