"""From a folder of predictions to scores: no model, no network, no benchmark file."""

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

from neo_jax.errors import InputError
from neo_jax.eval.benchmark import Benchmark
from neo_jax.eval.benchmarks import BENCHMARKS
from neo_jax.eval.predictions import LEFT_OUT, SETTINGS, TIMES, read_answers
from neo_jax.eval.scoring.summary import Metric, ScoredRow, Verdict
from neo_jax.eval.tables.rows import answer_of, listed


@dataclasses.dataclass(frozen=True)
class Scored:
    """What came of one benchmark."""

    benchmark: Benchmark
    about: dict[str, Any]  # settings.json
    scored_rows: list[ScoredRow]
    numbers: list[int]  # of the scored_rows rows in the file, from 1
    metrics: list[Metric]
    problems: list[dict[str, Any]]  # rows that could not be asked, read or scored_rows
    answers: list[dict[str, Any]]  # lines of predictions.jsonl
    times: list[dict[str, Any]]

    @property
    def faults(self) -> dict[str, int]:
        """Faults of the official scoring that decide rows, and how many."""
        return dict(
            collections.Counter(j.verdict.fault for j in self.scored_rows if j.verdict.fault)
        )

    @property
    def without_faults(self) -> float | None:
        """The headline, had those rows been scored as was meant; None if there are none."""
        if not self.faults:
            return None

        def mended(verdict: Verdict) -> Verdict:
            return verdict._replace(score=1 - verdict.score) if verdict.fault else verdict

        scored_rows = [one._replace(verdict=mended(one.verdict)) for one in self.scored_rows]
        return self.benchmark.summarise(scored_rows)[0].value


def score(folder: Path) -> Scored:
    """Scores what is answered in a benchmark's folder.

    Raises:
      InputError: if the folder has no predictions.
    """
    try:
        about = json.loads((folder / SETTINGS).read_text())
        benchmark = BENCHMARKS[about["benchmark"]]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: no predictions there that can be scored: {error}") from error
    answers, scored_rows, numbers, problems = read_answers(folder), [], [], []
    for answer in answers:
        row, number = answer.get("meta", {}), int(answer["id"].split()[1])
        problem = {"row": number, "index": row.get("index"), "problem": answer.get("error")}
        if problem["problem"] and problem["problem"].endswith(LEFT_OUT):
            problems.append(problem)
            continue
        if not row:  # the file is damaged there: nothing says what would be right
            problems.append(problem | {"problem": f"left out: {problem['problem']}"})
            continue
        said = answer_of(row, None if "error" in answer else answer["text"])
        try:
            verdict = benchmark.score_row(row, said)
        except InputError as error:
            problems.append(problem | {"problem": f"left out, cannot be scored: {error}"})
            continue
        has_answer = "correct_choice" in row or listed(row.get("answer", []))
        if problem["problem"] is None and not has_answer:
            problem["problem"] = "no right answer in the file"
        if problem["problem"]:
            problems.append(problem)
        scored_rows.append(ScoredRow(row, said, verdict))
        numbers.append(number)
    metrics = benchmark.summarise(scored_rows) if scored_rows else []
    times = folder / TIMES
    logged = [json.loads(line) for line in times.read_text().splitlines()] if times.exists() else []
    return Scored(benchmark, about, scored_rows, numbers, metrics, problems, answers, logged)
