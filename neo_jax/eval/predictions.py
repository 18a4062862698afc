"""Predictions: the model's answers to the rows of a benchmark, in `predictions.jsonl`.

A benchmark's folder has `settings.json`, and a line of `predictions.jsonl` for each answer, as
`infer/offline.py` writes it. A restarted run asks only the missing rows. While several hosts run,
each but the first writes `predictions.N.jsonl`; the first host merges them at the end. The `meta`
of a line is the row without its images, so that scoring needs no other file.
"""

import collections
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from neo_jax.errors import InputError
from neo_jax.eval.benchmark import Benchmark
from neo_jax.eval.multihost import Hosts
from neo_jax.eval.settings import Settings, differences
from neo_jax.eval.tables.benchmark_files import Table, is_image_column
from neo_jax.eval.tables.rows import Row
from neo_jax.infer.offline import Counts, Serve, answer_records
from neo_jax.infer.request import Request, Result
from neo_jax.infer.request_json import Record

PREDICTIONS, SETTINGS, TIMES = "predictions.jsonl", "settings.json", "times.jsonl"
# Compared with what is in predictions.jsonl, so these words are part of the file format.
LEFT_OUT = "no picture, as others have: not asked and not scored, as officially"


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark with its dataset, settings and model: all that decides the answers."""

    benchmark: Benchmark
    table: Table
    settings: Settings
    folders: Sequence[Path]  # searched for images and videos
    model: Mapping[str, Any]  # its directory, dtype and so on; JSON

    def record(self, number: int) -> Record:
        """The request for a row, or the error in it."""
        name, row, request, error = f"row {number + 1}", {}, None, None
        try:
            row = self.benchmark.row(self.table, number)
            if self.benchmark.is_left_out(row, self.table):
                raise InputError(LEFT_OUT)
            request = self.benchmark.request(row, number, self.table, self.settings, self.folders)
        except InputError as problem:
            error = str(problem)
        parts = [dataclasses.asdict(self.settings), dict(self.model), request and request.prompt]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        return Record(number + 1, name, key, _json_cells(row), request, error)


def _json_cells(row: Row) -> dict[str, Any]:
    """The cells of a row that are kept with its answer: JSON values, no images."""
    return {
        name: value for name, value in row.items() if not is_image_column(name) and _is_json(value)
    }


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def predict(
    task: Task,
    folder: Path,
    serve: Serve,
    *,
    hosts: Hosts = Hosts(),  # noqa: B008  (frozen)
    limit: int | None = None,
    retry_errors: bool = False,
    on_progress: Callable[[Counts], None] = lambda counts: None,
) -> None:
    """Answers this host's share of the rows that have no answer in `folder` yet.

    Args:
      serve: as of `infer.offline.run_batch`; not called if no host has a missing row.
      limit: use only the first rows.
      retry_errors: ask again the rows whose answer is an error.
      on_progress: called first and after each answer.

    Raises:
      InputError: if the folder's answers used different settings; names the differences.
    """
    own = folder / (f"predictions.{hosts.index}.jsonl" if hosts.index else PREDICTIONS)
    _check_settings(task, folder, hosts)
    kept = _answered_ids(own, retry_errors)
    missing = _missing_rows(task, folder, hosts, limit, retry_errors)
    numbers = sorted({*missing, *(int(name.split()[1]) - 1 for name in kept)})

    def read() -> Iterator[Record]:
        return (task.record(number) for number in numbers)

    def timed(requests: Iterator[Request]) -> Iterator[tuple[int, Result]]:
        results = serve(requests)  # loads the model, which the time leaves out
        start = time.monotonic()
        for count, result in enumerate(results, 1):
            yield result
            times.append((count, time.monotonic() - start))

    times: list[tuple[int, float]] = []
    is_needed = any(hosts.all_gather_bytes(b"1" if missing else b""))
    if missing:
        options = {"retry_errors": retry_errors, "on_progress": on_progress}
        answer_records(read, task.table.path, own, timed, **options)
        _log_time(folder, hosts, times)
    elif is_needed and hosts.count > 1:
        collections.deque(serve(iter(())), maxlen=0)  # every host loads the model, or none
    _merge(folder, hosts)


def _check_settings(task: Task, folder: Path, hosts: Hosts) -> None:
    path = folder / SETTINGS
    rows = len(task.table)
    now = {
        "benchmark": task.benchmark.name,
        "settings": dataclasses.asdict(task.settings),
        "model": dict(task.model),
        "data": {"file": task.table.path.name, "rows": rows},
    }
    has_answers = path.exists() and any(True for _ in _read_all_lines(folder))
    differing = differences(json.loads(path.read_text()), now) if has_answers else []
    # Gathered, so that all hosts stop if the settings of one differ.
    for message in hosts.all_gather_bytes("; ".join(differing).encode()):
        if message:
            raise InputError(
                f"{folder}: its answers used different settings ({message.decode()}): choose "
                "another --out, or use the settings of before"
            )
    if hosts.index == 0 and not has_answers:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(now, indent=2) + "\n")


def _missing_rows(
    task: Task, folder: Path, hosts: Hosts, limit: int | None, retry_errors: bool
) -> list[int]:
    """This host's share of the rows that no host has answered; numbers from 0."""
    lines = (answer for answer, _ in _read_all_lines(folder))
    answered = sorted({a["id"] for a in lines if not (retry_errors and "error" in a)})
    parts = hosts.all_gather_bytes(json.dumps(answered).encode())
    done = {name for part in parts for name in json.loads(part)}
    wanted = range(min(len(task.table), limit or len(task.table)))
    missing = [number for number in wanted if f"row {number + 1}" not in done]
    return missing[hosts.index :: hosts.count]


def _read_lines(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The answers in a file, parsed and raw; skips a last line that a kill cut off."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return
            try:
                answer = json.loads(raw)
                int(answer["id"].removeprefix("row "))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise InputError(f"{path}:{number}: not an answer: remove the line") from error
            yield answer, raw


def _read_all_lines(folder: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The answers in all prediction files of a folder."""
    for path in sorted(folder.glob("predictions*.jsonl")):
        yield from _read_lines(path)


def _answered_ids(path: Path, without_errors: bool = False) -> set[str]:
    return {a["id"] for a, _ in _read_lines(path) if not (without_errors and "error" in a)}


def _merge(folder: Path, hosts: Hosts) -> None:
    """Merges the answers of all hosts into the first host's file, in the order of rows."""
    others = [path for path in folder.glob("predictions.*.jsonl") if path.name != PREDICTIONS]
    parts = hosts.all_gather_bytes(b"".join(raw for path in others for _, raw in _read_lines(path)))
    if hosts.index == 0 and any(parts):
        found: dict[str, tuple[dict, bytes]] = {}
        lines = [(json.loads(raw), raw + b"\n") for part in parts for raw in part.splitlines()]
        for answer, raw in [*_read_lines(folder / PREDICTIONS), *lines]:
            if answer["id"] not in found or "error" in found[answer["id"]][0]:
                found[answer["id"]] = answer, raw
        ordered = sorted(found.values(), key=lambda one: int(one[0]["id"].split()[1]))
        write_atomic(folder / PREDICTIONS, b"".join(raw for _, raw in ordered))
    hosts.all_gather_bytes(b"")  # a barrier: the merged file is on disk
    for path in others:
        path.unlink(missing_ok=True)


def _log_time(folder: Path, hosts: Hosts, times: Sequence[tuple[int, float]]) -> None:
    if times:
        answers, seconds = times[-1]
        line = {"host": hosts.index, "hosts": hosts.count, "answers": answers, "seconds": seconds}
        with open(folder / TIMES, "a") as file:
            file.write(json.dumps(line) + "\n")


def write_atomic(path: Path, data: str | bytes) -> None:
    """Writes a file atomically: a kill leaves the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """The answers in a folder, in the order of rows, from the files of all hosts."""
    found: dict[str, dict[str, Any]] = {}
    for answer, _ in _read_all_lines(folder):
        if answer["id"] not in found or "error" in found[answer["id"]]:
            found[answer["id"]] = answer
    return sorted(found.values(), key=lambda answer: int(answer["id"].split()[1]))
