"""Arguments, checks and a progress bar that the three converters share."""

import argparse
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from neo_jax.command_line import make_parser
from neo_jax.errors import InputError
from neo_jax.sharding import MESH_SIZES


def parser(prog: str, doc: str | None, example: str) -> argparse.ArgumentParser:
    """A parser with the arguments of every converter: SRC, DST and --overwrite."""
    result = make_parser(prog, doc, f"example: %(prog)s {example}")
    result.add_argument("source", metavar="SRC", type=Path)
    result.add_argument("target", metavar="DST", type=Path, nargs="?")
    result.add_argument("--overwrite", action="store_true", help="replace what is at DST")
    return result


def convert(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Checks SRC and DST, then runs a converter. Returns the exit code.

    Raises:
      InputError: if DST is missing, or SRC and DST overlap.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)
    if args.target is None and not getattr(args, "check", False):
        raise InputError("give DST, the directory to write")
    for source in (args.source, getattr(args, "pre_buffer_from", None)):
        _refuse_overlap(source, args.target)
    run(args)
    return 0


def _refuse_overlap(source: Path | None, target: Path | None) -> None:
    """Refuses a target that overlaps the source: overwriting it would delete the source."""
    if source is None or target is None:
        return
    one, other = source.resolve(), target.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise InputError(f"{source} and {target}: SRC and DST are the same or inside each other")


def progress(total: int, what: str) -> tqdm:
    """A bar of bytes and their rate."""
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None)


def log(message: str) -> None:
    """Prints a line to standard error."""
    print(message, file=sys.stderr)


def mesh_shape(text: str) -> tuple[int, ...]:
    """'1x8x1' -> (1, 8, 1)."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give the sizes of {MESH_SIZES[:3]} as in 1x8x1"
        )
    return tuple(int(size) for size in text.split("x"))
