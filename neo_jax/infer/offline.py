"""A file of requests to a file of answers, one JSON object a line; a killed run can go on.

    {"id": "a", "image": "cat.jpg", "prompt": "What is this?", "max_new_tokens": 32, "meta": 7}

    {"id": "a", "text": "A cat.", "token_ids": [32, 8251, 13, 151645], "finish_reason": "stop",
     "usage": {"prompt_tokens": 80, ...}, "meta": 7, "key": "5f0c..."}

`request_json.py` lists the fields of a request. A failed request's answer has an "error". The key
tells whether an answer belongs to the request that now has its id.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from neo_jax.errors import InputError
from neo_jax.infer.request import Request, Result
from neo_jax.infer.request_json import Record, read_records, request_from, without_nulls

Serve = Callable[[Iterator[Request]], Generator[tuple[int, Result], None, None]]

_START = b'{"id": '  # of every answer
_NO_USAGE = {"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0}


@dataclasses.dataclass(frozen=True)
class Counts:
    """How far a batch is."""

    total: int  # requests
    kept: int  # answers of earlier runs
    failed: int  # answers with an "error", of all runs
    written: int = 0  # answers of this run


def run_batch(
    source: str | Path,
    target: str | Path,
    serve: Serve,
    *,
    defaults: Mapping[str, object] | None = None,
    settings: Mapping[str, object] | None = None,
    retry_errors: bool = False,
    on_progress: Callable[[Counts], None] = lambda counts: None,
) -> Counts:
    """Appends an answer to `target` for each request of `source` that has none there yet.

    A kill loses the answer being written at most; a request that fails stops none of the rest.

    Args:
      serve: a generator function: requests to (number of the request from 0, result), in any
        order. It takes requests when it needs them, and is called only if there are any.
      defaults: fields for requests that lack them.
      settings: what else decides the answers, such as the model; JSON.
      retry_errors: ask those again whose answer is an error.
      on_progress: called first and after each answer.

    Raises:
      InputError: naming file and line: a file that cannot be used, two requests with one id, or
        answers to other requests or under other settings in `target`.
    """
    source, defaults = Path(source), without_nulls(defaults or {})
    request_from({"prompt": "", **defaults}, source.parent, {})  # says once what is wrong in them
    read = functools.partial(read_records, source, defaults, settings or {})
    return answer_records(
        read, source, target, serve, retry_errors=retry_errors, on_progress=on_progress
    )


def answer_records(
    read: Callable[[], Iterator[Record]],
    source: str | Path,
    target: str | Path,
    serve: Serve,
    *,
    retry_errors: bool = False,
    on_progress: Callable[[Counts], None] = lambda counts: None,
) -> Counts:
    """As `run_batch`, of requests that come from anywhere.

    Args:
      read: gives the same records each time; it is called thrice.
      source: the file they come from, for messages.
    """
    source, target = Path(source), Path(target)
    left = _survey(source, read())
    waiting: dict[int, Record] = {}

    def take(is_bad: bool) -> Iterator[Record]:
        for record in read():
            # With another line or key, it is news since the survey: for the next run.
            is_left = left.get(str(record.id)) == (record.line, record.key)
            if is_left and (record.request is None) == is_bad:
                del left[str(record.id)]
                yield record

    def requests() -> Iterator[Request]:
        for index, record in enumerate(take(is_bad=False)):
            waiting[index] = record
            yield record.request

    with _opened(target, source, left, retry_errors) as (file, counts):
        answers = _Answers(file, target, source, counts, on_progress)
        for record in take(is_bad=True):
            answers.add(record, Result("", (), "error", {}, record.error))
        if left:
            with contextlib.closing(serve(requests())) as results:
                for index, result in results:
                    answers.add(waiting.pop(index), result)
    if waiting:
        raise RuntimeError(f"serve ended without an answer to {len(waiting)} requests")
    if left:
        raise InputError(f"{source}: changed while it was read, {len(left)} are left: run again")
    return answers.counts


def _survey(source: Path, records: Iterator[Record]) -> dict[str, tuple[int, str]]:
    """Each id's line number and key."""
    found = {}
    for record in records:
        line, _ = found.setdefault(str(record.id), (record.line, record.key))
        if line != record.line:
            raise InputError(
                f"{source}:{record.line}: id {record.id!r} is that of line {line} too: give each "
                "request its own (one without has its line's number)"
            )
    if not found:
        raise InputError(f"{source}: no requests in it")
    return found


class _Answers:
    """Appends answers to their file, and counts them."""

    def __init__(self, file, target, source, counts, on_progress):
        self._file, self._target, self._source = file, target, source
        self.counts, self._on_progress = counts, on_progress
        on_progress(counts)

    def add(self, record: Record, result: Result) -> None:
        answer = {"id": record.id, **dataclasses.asdict(result)}
        answer["usage"] = {**_NO_USAGE, **result.usage}
        if answer.pop("error") is not None:
            answer["error"] = f"{self._source.name}:{record.line}: {result.error}"
        if record.meta is not None:
            answer["meta"] = record.meta
        # Half a surrogate pair, as in odd file names, turns into JSON's own escape for it.
        text = json.dumps({**answer, "key": record.key}, ensure_ascii=False)
        with _file_errors(self._target, "what it has is safe: mend this and run again"):
            _write(self._file, text.encode(errors="backslashreplace") + b"\n")
            os.fsync(self._file.fileno())
        written, failed = self.counts.written + 1, self.counts.failed + ("error" in answer)
        self.counts = dataclasses.replace(self.counts, written=written, failed=failed)
        self._on_progress(self.counts)


@contextlib.contextmanager
def _opened(target: Path, source: Path, left: dict, retry_errors: bool):
    """The file of answers, locked, to append to; and Counts. What is answered leaves `left`."""
    total = len(left)
    with contextlib.ExitStack() as stack:
        with _file_errors(target, "choose another place"):
            if target.exists() and (not target.is_file() or target.samefile(source)):
                raise InputError(f"{target}: not a file of answers: choose another")
            target.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(target, "ab", buffering=0))
            _lock(file, target)
            dropped, failed, size = _review(target, source, left, retry_errors)
            file.truncate(size)
            if dropped:
                partial = target.resolve().with_name(f".{target.name}.partial")
                file = stack.enter_context(open(partial, "wb", buffering=0))
                stack.callback(partial.unlink, missing_ok=True)
                _replace(target.resolve(), partial, file, dropped)
        yield file, Counts(total, total - len(left), failed)


def _lock(file: BinaryIO, target: Path) -> None:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Not so if another run has replaced it between opening and locking.
        if os.path.samestat(os.fstat(file.fileno()), os.stat(target)):
            return
    raise InputError(f"{target}: another run is writing it: wait for that or choose another file")


def _review(target: Path, source: Path, left: dict, retry_errors: bool) -> tuple[set, int, int]:
    """Takes what is answered from `left`; (lines to drop, other errors, bytes of whole lines)."""
    dropped, seen, failed, size = set(), {}, 0, 0
    with open(target, "rb") as file:
        for number, raw in enumerate(file, 1):
            where, is_cut = f"{target}:{number}", not raw.endswith(b"\n")
            if is_cut and raw.startswith(_START[: len(raw)]):
                break
            try:
                answer = None if is_cut else json.loads(raw)
                name, key, is_error = str(answer["id"]), answer["key"], "error" in answer
            except (ValueError, LookupError, TypeError) as error:
                raise InputError(f"{where}: not an answer: choose another file") from error
            size += len(raw)
            if is_error and retry_errors:
                dropped.add(number)
                continue
            failed += is_error
            mend = "choose another file or " + ("retry errors" if is_error else "remove the line")
            if name not in left:
                raise InputError(f"{where}: id {name!r} is not in {source}: {mend}")
            if key != left[name][1]:
                raise InputError(
                    f"{where}: id {name!r} was another request or had other settings than now "
                    f"({source}:{left[name][0]}): {mend}"
                )
            if seen.setdefault(name, number) != number:
                raise InputError(f"{where}: id {name!r} is in line {seen[name]} too: {mend}")
    for name in seen:
        del left[name]
    return dropped, failed, size


def _replace(target: Path, partial: Path, file: BinaryIO, dropped: set[int]) -> None:
    """Fills and locks `file`, which is at `partial`, and puts it in the target's place."""
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(target, "rb") as old:
        for number, raw in enumerate(old, 1):
            if number not in dropped:
                _write(file, raw)
    os.fsync(file.fileno())
    partial.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _write(file: BinaryIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


@contextlib.contextmanager
def _file_errors(path: Path, advice: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror}: {advice}") from error
