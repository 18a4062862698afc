"""What the three converters share: arguments, a progress bar, one-line errors."""

import argparse
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from neo_jax.errors import InputError
from neo_jax.sharding import MESH_SIZES

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parser(module: str, doc: str, example: str) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=doc,
        epilog=f"example: python -m {module} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("source", metavar="SRC", type=Path)
    result.add_argument("target", metavar="DST", type=Path, nargs="?")
    result.add_argument("--overwrite", action="store_true", help="replace what is at DST")
    return result


def main(name: str, run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Runs a converter; bad input becomes one line and exit code 2."""
    logging.basicConfig(format=f"{name}: %(message)s", level=logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        if args.target is None and not getattr(args, "check", False):
            raise InputError("give DST, the directory to write")
        for source in (args.source, getattr(args, "pre_buffer_from", None)):
            _refuse_overlap(source, args.target)
        run(args)
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return 0


def _refuse_overlap(source: Path | None, target: Path | None) -> None:
    """Overwriting a directory must not take what is read with it."""
    if source is None or target is None:
        return
    one, other = source.resolve(), target.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise InputError(f"{source} and {target}: SRC and DST are the same or inside each other")


def progress(total: int, what: str) -> tqdm:
    """A bar of bytes and their rate."""
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None)


def say(message: str) -> None:
    print(message, file=sys.stderr)


def mesh_shape(text: str) -> tuple[int, ...]:
    """'1x8x1' -> (1, 8, 1)."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give the sizes of {MESH_SIZES[:3]} as in 1x8x1"
        )
    return tuple(int(size) for size in text.split("x"))


def byte_size(text: str) -> int:
    """'5GB' -> 5 * 10**9."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r}: give a size as in 5GB, 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
