"""Benchmarks from file to report: predict what is missing, score, write the report."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from neo_jax.errors import InputError
from neo_jax.eval import page, report
from neo_jax.eval.benchmark import Benchmark
from neo_jax.eval.benchmarks import choose, find_file
from neo_jax.eval.multihost import Hosts
from neo_jax.eval.predictions import SETTINGS, Work, predict
from neo_jax.eval.score import Scored, score
from neo_jax.eval.settings import Settings, make_settings
from neo_jax.eval.tables.benchmark_files import open_table
from neo_jax.infer.offline import Counts, Serve


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to evaluate."""

    names: str  # benchmarks or groups, with commas
    data: Path | None  # folder with a file or folder for each, or one file
    out: Path  # of the run: a folder for each benchmark, and the report
    preset: str = "greedy"
    overrides: Sequence[str] = ()
    media: Path | None = None  # where pictures and videos are, if not beside the data
    limit: int | None = None
    retry_errors: bool = False

    def files(self) -> dict[Benchmark, Path]:
        """Each benchmark's file or folder; no settings are wrong if this returns."""
        if self.data is None:
            raise InputError("say where the benchmarks' files are: --data DIR")
        benchmarks = choose(self.names)
        if self.data.is_file() and len(benchmarks) > 1:
            raise InputError(f"{self.data}: one file, but {len(benchmarks)} benchmarks")
        for benchmark in benchmarks:
            self._settings(benchmark).sampling(0)
        return {benchmark: find_file(benchmark, self.data) for benchmark in benchmarks}

    def _settings(self, benchmark: Benchmark) -> Settings:
        return make_settings(benchmark.group, self.preset, benchmark.settings, self.overrides)

    def works(self, model: Mapping[str, Any]) -> list[Work]:
        """Each benchmark with its rows and settings; `model` is what else decides, JSON."""
        return [self._work(benchmark, path, model) for benchmark, path in self.files().items()]

    def _work(self, benchmark: Benchmark, path: Path, model: Mapping[str, Any]) -> Work:
        settings, table = self._settings(benchmark), open_table(path)
        here = table.path if table.path.is_dir() else table.path.parent
        folders = [folder for folder in (self.media, here) if folder is not None]
        folders += [folder / name for folder in folders[:2] for name in benchmark.files]
        return Work(benchmark, table, settings, [f for f in folders if f.is_dir()], model)


def evaluate(
    plan: Plan,
    model: Mapping[str, Any],
    serve: Serve,
    hosts: Hosts = Hosts(),  # noqa: B008  (frozen)
    progress: Callable[[str], Callable[[Counts], None]] = lambda name: lambda counts: None,
) -> list[Scored]:
    """Asks what is missing, scores it and writes the report.

    Args:
      model: what decides the answers besides settings; JSON.
      serve: see `infer.batch.run_batch`.
      progress: of a benchmark's name: what to call with counts.

    Raises:
      InputError: naming the file, row or setting that is wrong.
    """
    for work in plan.works(model):
        predict(
            work,
            plan.out / work.benchmark.name,
            serve,
            hosts=hosts,
            limit=plan.limit,
            retry_errors=plan.retry_errors,
            on_progress=progress(work.benchmark.name),
        )
        if hosts.index == 0:
            rows = min(len(work.table), plan.limit or len(work.table))
            page.keep_samples(work, plan.out / work.benchmark.name, rows)
    return score_run(plan.out) if hosts.index == 0 else []


def score_run(out: Path) -> list[Scored]:
    """Scores every benchmark of a run and writes its report."""
    folders = sorted(path.parent for path in out.glob(f"*/{SETTINGS}"))
    if not folders:
        raise InputError(f"{out}: no predictions there")
    scored = [score(folder) for folder in folders]
    report.write(scored, out)
    return scored


def show(scored: Sequence[Scored]) -> Iterator[str]:
    """A line for each benchmark."""
    for one in scored:
        headline = one.metrics[0] if one.metrics else None
        said = f"{headline.value:.2f} ({headline.name})" if headline else "nothing answered"
        yield f"{one.benchmark.title:16} {said}, {len(one.scored_rows)} rows" + (
            f", {len(one.problems)} with problems" if one.problems else ""
        )
