"""Scoring: from a folder of predictions to verdicts and metrics.

Runs the scorer and the metrics of the benchmark (`scoring/`) over `predictions.jsonl`. Needs no
model, no network and no dataset file.
"""

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

from neo_jax.errors import InputError
from neo_jax.eval.benchmark import Benchmark
from neo_jax.eval.benchmarks import BENCHMARKS
from neo_jax.eval.predictions import LEFT_OUT, SETTINGS, TIMES, read_answers
from neo_jax.eval.scoring.matching import prediction_text
from neo_jax.eval.scoring.metrics import Metric, ScoredRow, Verdict
from neo_jax.eval.tables.rows import listed


@dataclasses.dataclass(frozen=True)
class ScoredBenchmark:
    """The verdicts and metrics of one benchmark."""

    benchmark: Benchmark
    run_info: dict[str, Any]  # settings.json
    scored_rows: list[ScoredRow]
    row_numbers: list[int]  # of the scored rows in the dataset, from 1
    metrics: list[Metric]
    problems: list[dict[str, Any]]  # rows that could not be read, asked or scored
    answers: list[dict[str, Any]]  # lines of predictions.jsonl
    times: list[dict[str, Any]]  # lines of times.jsonl

    @property
    def faults(self) -> dict[str, int]:
        """Faults of the official scorer, and the number of rows that each decides."""
        return dict(
            collections.Counter(one.verdict.fault for one in self.scored_rows if one.verdict.fault)
        )

    @property
    def without_faults(self) -> float | None:
        """The headline metric if those rows are scored as intended; None if there are none."""
        if not self.faults:
            return None

        def corrected(verdict: Verdict) -> Verdict:
            return verdict._replace(score=1 - verdict.score) if verdict.fault else verdict

        scored_rows = [one._replace(verdict=corrected(one.verdict)) for one in self.scored_rows]
        return self.benchmark.summarise(scored_rows)[0].value


def score_predictions(folder: Path) -> ScoredBenchmark:
    """Scores the predictions in a benchmark's folder.

    Raises:
      InputError: if the folder has no predictions.
    """
    try:
        run_info = json.loads((folder / SETTINGS).read_text())
        benchmark = BENCHMARKS[run_info["benchmark"]]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: no predictions there that can be scored: {error}") from error
    answers, scored_rows, row_numbers, problems = read_answers(folder), [], [], []
    for answer in answers:
        row, number = answer.get("meta", {}), int(answer["id"].split()[1])
        problem = {"row": number, "index": row.get("index"), "problem": answer.get("error")}
        if problem["problem"] and problem["problem"].endswith(LEFT_OUT):
            problems.append(problem)
            continue
        if not row:  # the dataset is damaged there, so the right answer is unknown
            problems.append(problem | {"problem": f"left out: {problem['problem']}"})
            continue
        prediction = prediction_text(None if "error" in answer else answer["text"])
        try:
            verdict = benchmark.score_row(row, prediction)
        except InputError as error:
            problems.append(problem | {"problem": f"left out, cannot be scored: {error}"})
            continue
        has_answer = "correct_choice" in row or listed(row.get("answer", []))
        if problem["problem"] is None and not has_answer:
            problem["problem"] = "no right answer in the file"
        if problem["problem"]:
            problems.append(problem)
        scored_rows.append(ScoredRow(row, prediction, verdict))
        row_numbers.append(number)
    metrics = benchmark.summarise(scored_rows) if scored_rows else []
    times = folder / TIMES
    logged = [json.loads(line) for line in times.read_text().splitlines()] if times.exists() else []
    return ScoredBenchmark(
        benchmark, run_info, scored_rows, row_numbers, metrics, problems, answers, logged
    )
