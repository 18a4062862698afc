"""The answers to a benchmark's rows: asked once, kept line by line, merged from all hosts.

A folder has `settings.json`, `predictions.jsonl` with a line for each row that is answered, as
`infer/offline.py` writes it, and while several hosts run `predictions.1.jsonl` and so on. A line's
`meta` is its row without pictures, so that nothing else is needed for a score.
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
from neo_jax.eval.tables.benchmark_files import Table, is_picture_column
from neo_jax.eval.tables.rows import Row
from neo_jax.infer.offline import Counts, Serve, answer_records
from neo_jax.infer.request import Request, Result
from neo_jax.infer.request_json import Record

PREDICTIONS, SETTINGS, TIMES = "predictions.jsonl", "settings.json", "times.jsonl"
LEFT_OUT = "no picture, as others have: not asked and not scored, as officially"


@dataclasses.dataclass(frozen=True)
class Work:
    """A benchmark with all that decides its answers."""

    benchmark: Benchmark
    table: Table
    settings: Settings
    folders: Sequence[Path]  # where pictures and videos may be
    model: Mapping[str, Any]  # what decides the answers besides; JSON

    def record(self, number: int) -> Record:
        """The request of a row, or what is wrong with it."""
        name, row, request, error = f"row {number + 1}", {}, None, None
        try:
            row = self.benchmark.row(self.table, number)
            if self.benchmark.is_left_out(row, self.table):
                raise InputError(LEFT_OUT)
            request = self.benchmark.request(row, number, self.table, self.settings, self.folders)
        except InputError as problem:
            error = str(problem)
        said = [dataclasses.asdict(self.settings), dict(self.model), request and request.prompt]
        key = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]
        return Record(number + 1, name, key, _kept(row), request, error)


def _kept(row: Row) -> dict[str, Any]:
    """What of a row is kept with its answer: no pictures, nothing that is not JSON."""
    return {
        name: value
        for name, value in row.items()
        if not is_picture_column(name) and _is_json(value)
    }


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def predict(
    work: Work,
    folder: Path,
    serve: Serve,
    *,
    hosts: Hosts = Hosts(),  # noqa: B008  (frozen)
    limit: int | None = None,
    retry_errors: bool = False,
    on_progress: Callable[[Counts], None] = lambda counts: None,
) -> None:
    """Asks what of a benchmark has no answer in `folder` yet, this host its share of it.

    Args:
      serve: see `run_batch`; not called if there is nothing to ask.
      limit: ask only the first rows.

    Raises:
      InputError: if the folder has answers under other settings, saying which differ.
    """
    own = folder / (f"predictions.{hosts.index}.jsonl" if hosts.index else PREDICTIONS)
    _check_settings(work, folder, hosts)
    kept = _answered(own, retry_errors)
    missing = _share(work, folder, hosts, limit, retry_errors)
    numbers = sorted({*missing, *(int(name.split()[1]) - 1 for name in kept)})

    def read() -> Iterator[Record]:
        return (work.record(number) for number in numbers)

    def timed(requests: Iterator[Request]) -> Iterator[tuple[int, Result]]:
        results = serve(requests)  # loads the model, which is not counted
        start = time.monotonic()
        for count, result in enumerate(results, 1):
            yield result
            times.append((count, time.monotonic() - start))

    times: list[tuple[int, float]] = []
    is_needed = any(hosts.all_gather_bytes(b"1" if missing else b""))
    if missing:
        options = {"retry_errors": retry_errors, "on_progress": on_progress}
        answer_records(read, work.table.path, own, timed, **options)
        _log_time(folder, hosts, times)
    elif is_needed and hosts.count > 1:
        collections.deque(serve(iter(())), maxlen=0)  # all hosts load it, or none
    _merge(folder, hosts)


def _check_settings(work: Work, folder: Path, hosts: Hosts) -> None:
    path = folder / SETTINGS
    rows = len(work.table)
    now = {
        "benchmark": work.benchmark.name,
        "settings": dataclasses.asdict(work.settings),
        "model": dict(work.model),
        "data": {"file": work.table.path.name, "rows": rows},
    }
    is_begun = path.exists() and any(True for _ in _all_lines(folder))
    differing = differences(json.loads(path.read_text()), now) if is_begun else []
    for said in hosts.all_gather_bytes("; ".join(differing).encode()):
        if said:
            raise InputError(
                f"{folder}: its answers were made otherwise ({said.decode()}): choose another "
                "--out, or run as before"
            )
    if hosts.index == 0 and not is_begun:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(now, indent=2) + "\n")


def _share(
    work: Work, folder: Path, hosts: Hosts, limit: int | None, retry_errors: bool
) -> list[int]:
    """Numbers of the rows that no host has answered and that are ours to ask."""
    lines = (answer for answer, _ in _all_lines(folder))
    here = sorted({a["id"] for a in lines if not (retry_errors and "error" in a)})
    parts = hosts.all_gather_bytes(json.dumps(here).encode())
    done = {name for part in parts for name in json.loads(part)}
    wanted = range(min(len(work.table), limit or len(work.table)))
    missing = [number for number in wanted if f"row {number + 1}" not in done]
    return missing[hosts.index :: hosts.count]


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Whole lines of a file of answers; what a kill cut off is not one."""
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


def _all_lines(folder: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Those of all files of answers in a folder."""
    for path in sorted(folder.glob("predictions*.jsonl")):
        yield from _lines(path)


def _answered(path: Path, without_errors: bool = False) -> set[str]:
    return {a["id"] for a, _ in _lines(path) if not (without_errors and "error" in a)}


def _merge(folder: Path, hosts: Hosts) -> None:
    """Puts the answers of all hosts into the first one's file, in the order of the rows."""
    others = [path for path in folder.glob("predictions.*.jsonl") if path.name != PREDICTIONS]
    parts = hosts.all_gather_bytes(b"".join(raw for path in others for _, raw in _lines(path)))
    if hosts.index == 0 and any(parts):
        found: dict[str, tuple[dict, bytes]] = {}
        lines = [(json.loads(raw), raw + b"\n") for part in parts for raw in part.splitlines()]
        for answer, raw in [*_lines(folder / PREDICTIONS), *lines]:
            if answer["id"] not in found or "error" in found[answer["id"]][0]:
                found[answer["id"]] = answer, raw
        ordered = sorted(found.values(), key=lambda one: int(one[0]["id"].split()[1]))
        write_whole(folder / PREDICTIONS, b"".join(raw for _, raw in ordered))
    hosts.all_gather_bytes(b"")  # what was gathered is safe
    for path in others:
        path.unlink(missing_ok=True)


def _log_time(folder: Path, hosts: Hosts, times: Sequence[tuple[int, float]]) -> None:
    if times:
        answers, seconds = times[-1]
        line = {"host": hosts.index, "hosts": hosts.count, "answers": answers, "seconds": seconds}
        with open(folder / TIMES, "a") as file:
            file.write(json.dumps(line) + "\n")


def write_whole(path: Path, data: str | bytes) -> None:
    """Writes a file that is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """The answers of a folder in the order of their rows, from the files of all hosts."""
    found: dict[str, dict[str, Any]] = {}
    for answer, _ in _all_lines(folder):
        if answer["id"] not in found or "error" in found[answer["id"]]:
            found[answer["id"]] = answer
    return sorted(found.values(), key=lambda answer: int(answer["id"].split()[1]))
