"""Atomic writes of a checkpoint directory, and the small files beside its weights."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from neo_jax.errors import InputError

_SIDE_SUFFIXES = {".json", ".txt", ".jinja", ".py", ".md"}
_RUN_FILES = {"run.json", "held_out.json"}  # of a training run, not of its model


def read_json(path: Path) -> dict:
    """Reads a JSON object from a file; InputError names the file."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


@contextlib.contextmanager
def new_directory(
    target: str | Path,
    needed_bytes: int,
    *,
    overwrite: bool = False,
    log: Callable[[str], None] = lambda message: None,
) -> Iterator[Path]:
    """Creates a directory atomically: it gets its name only if the block ends without an error.

        .NAME.partial     what the block fills; renamed to NAME at the end
        .NAME.replaced    the old NAME, until the new one has taken its place
        .NAME.lock        keeps a second run away

    What a killed run left is removed first, and logged.

    Args:
      target: must not exist, unless `overwrite`; then it is replaced at the end.
      needed_bytes: about how much will be written.
      log: called with a message about what a killed run left.

    Raises:
      InputError: if the target exists, cannot be written, or the disk has too little room.
    """
    target = _local_path(target)
    partial, old = (target.with_name(f".{target.name}.{end}") for end in ("partial", "replaced"))
    if old.is_dir() and not target.exists():
        log(f"{target}: a run was stopped while replacing it; put back as it was")
        old.rename(target)
    _check_target(target, overwrite)
    lock = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(target)
        if partial.exists():
            log(f"{partial}: left by a run that did not finish; starting over")
            shutil.rmtree(partial)
        _check_room(target, needed_bytes)
        partial.mkdir()
        yield partial
        _flush(partial)
        _replace(partial, target, old)
    except OSError as error:
        raise InputError(f"{target}: cannot write: {error}") from error
    except ValueError as error:
        if _is_full_disk(error):
            raise InputError(f"{target}: cannot write: {error}") from error
        raise
    finally:
        if lock is not None:  # otherwise the files are another run's
            shutil.rmtree(partial, ignore_errors=True)
            _lock_path(target).unlink(missing_ok=True)
            lock.close()


def side_files(source: Path) -> list[Path]:
    """The configuration, tokenizer and code files of a checkpoint directory."""
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and path.suffix in _SIDE_SUFFIXES
        and not path.name.endswith(".index.json")
        and path.name not in _RUN_FILES
    ]


def copy_side_files(source: Path, target: Path) -> None:
    """Copies the configuration, tokenizer and code files of a checkpoint directory."""
    for path in side_files(source):
        shutil.copyfile(path, target / path.name)


def _local_path(target: str | Path) -> Path:
    if re.match(r"\w+:/", str(target)):
        raise InputError(f"{target}: only local directories are written; copy it there afterwards")
    return Path(target).absolute()


def _check_target(target: Path, overwrite: bool) -> None:
    if (target.exists() or target.is_symlink()) and not overwrite:
        raise InputError(f"{target} exists: choose another place or allow to overwrite it")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"{target}: is no directory of its own, so it is not replaced")


def _check_room(target: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed_bytes:
        raise InputError(
            f"{target}: needs {needed_bytes / 1e9:.1f} GB, only {free / 1e9:.1f} GB are free"
        )


def _lock_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _lock(target: Path) -> IO:
    """Locks the target, so that no second run writes it."""
    file = _lock_path(target).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise InputError(f"{target}: another run is writing it now") from error
    return file


def _replace(partial: Path, target: Path, old: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    partial.rename(target)
    shutil.rmtree(old)


def _flush(directory: Path) -> None:
    """Flushes every file to disk, so that a power cut leaves no half-written final directory."""
    for folder, _, names in os.walk(directory):
        for path in [folder, *(os.path.join(folder, name) for name in names)]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _is_full_disk(error: ValueError) -> bool:
    """Whether an error of TensorStore means a full disk: it is a ValueError there."""
    return os.strerror(errno.ENOSPC) in str(error) or os.strerror(errno.EDQUOT) in str(error)
