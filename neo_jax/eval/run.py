"""The evaluation loop: for each benchmark predict, score, and write the report."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from neo_jax.errors import InputError
from neo_jax.eval import page, report
from neo_jax.eval.benchmark import Benchmark
from neo_jax.eval.benchmarks import choose, find_file
from neo_jax.eval.multihost import Hosts
from neo_jax.eval.predictions import SETTINGS, Task, predict
from neo_jax.eval.score_predictions import ScoredBenchmark, score_predictions
from neo_jax.eval.settings import Settings, make_settings
from neo_jax.eval.tables.benchmark_files import open_table
from neo_jax.infer.offline import Counts, Serve


@dataclasses.dataclass(frozen=True)
class Plan:
    """Benchmarks to evaluate, their datasets and settings, and the folder of the run."""

    names: str  # benchmarks or groups, separated by commas
    data: Path | None  # a folder with the datasets, or one dataset's file
    out: Path  # the run's folder: the report, and a folder for each benchmark
    preset: str = "greedy"
    overrides: Sequence[str] = ()  # "name=value" of any field of `Settings`
    media: Path | None = None  # folder of images and videos, if not beside the datasets
    limit: int | None = None  # use only the first rows of each
    retry_errors: bool = False  # ask again the rows whose answer is an error

    def files(self) -> dict[Benchmark, Path]:
        """The dataset of each benchmark. Checks the settings too.

        Raises:
          InputError: for an unknown benchmark, a missing dataset, or a bad setting.
        """
        if self.data is None:
            raise InputError("give --data DIR, the folder with the benchmarks' files")
        benchmarks = choose(self.names)
        if self.data.is_file() and len(benchmarks) > 1:
            raise InputError(f"{self.data}: one file, but {len(benchmarks)} benchmarks")
        for benchmark in benchmarks:
            self._settings(benchmark).sampling(0)
        return {benchmark: find_file(benchmark, self.data) for benchmark in benchmarks}

    def _settings(self, benchmark: Benchmark) -> Settings:
        return make_settings(benchmark.group, self.preset, benchmark.settings, self.overrides)

    def tasks(self, model: Mapping[str, Any]) -> list[Task]:
        """Each benchmark with its dataset and settings; `model`: see `Task.model`."""
        return [self._task(benchmark, path, model) for benchmark, path in self.files().items()]

    def _task(self, benchmark: Benchmark, path: Path, model: Mapping[str, Any]) -> Task:
        settings, table = self._settings(benchmark), open_table(path)
        beside = table.path if table.path.is_dir() else table.path.parent
        folders = [folder for folder in (self.media, beside) if folder is not None]
        folders += [folder / name for folder in folders[:2] for name in benchmark.files]
        return Task(benchmark, table, settings, [f for f in folders if f.is_dir()], model)


def evaluate(
    plan: Plan,
    model: Mapping[str, Any],
    serve: Serve,
    hosts: Hosts = Hosts(),  # noqa: B008  (frozen)
    progress: Callable[[str], Callable[[Counts], None]] = lambda name: lambda counts: None,
) -> list[ScoredBenchmark]:
    """Answers the missing rows, scores all answers and writes the report.

    Args:
      model: what decides the answers besides the settings: directory, dtype and so on; JSON.
      serve: as of `infer.offline.run_batch`.
      progress: gives for a benchmark's name the callback that `predict` calls with counts.

    Returns:
      The scored benchmarks of the whole run folder; nothing on hosts other than the first.

    Raises:
      InputError: naming the bad file, row or setting.
    """
    for task in plan.tasks(model):
        predict(
            task,
            plan.out / task.benchmark.name,
            serve,
            hosts=hosts,
            limit=plan.limit,
            retry_errors=plan.retry_errors,
            on_progress=progress(task.benchmark.name),
        )
        if hosts.index == 0:
            rows = min(len(task.table), plan.limit or len(task.table))
            page.keep_samples(task, plan.out / task.benchmark.name, rows)
    return score_run(plan.out) if hosts.index == 0 else []


def score_run(out: Path) -> list[ScoredBenchmark]:
    """Scores every benchmark of a run's folder and writes the report; needs no model."""
    folders = sorted(path.parent for path in out.glob(f"*/{SETTINGS}"))
    if not folders:
        raise InputError(f"{out}: no predictions there")
    scored = [score_predictions(folder) for folder in folders]
    report.write(scored, out)
    return scored


def show(scored: Sequence[ScoredBenchmark]) -> Iterator[str]:
    """A summary line for each benchmark."""
    for one in scored:
        headline = one.metrics[0] if one.metrics else None
        result = f"{headline.value:.2f} ({headline.name})" if headline else "nothing answered"
        yield f"{one.benchmark.title:16} {result}, {len(one.scored_rows)} rows" + (
            f", {len(one.problems)} with problems" if one.problems else ""
        )
