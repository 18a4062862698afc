"""What the three converters share: arguments, checks, a progress bar."""

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
    result = make_parser(prog, doc, f"example: %(prog)s {example}")
    result.add_argument("source", metavar="SRC", type=Path)
    result.add_argument("target", metavar="DST", type=Path, nargs="?")
    result.add_argument("--overwrite", action="store_true", help="replace what is at DST")
    return result


def convert(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Checks what all converters have in common, then runs one."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)
    if args.target is None and not getattr(args, "check", False):
        raise InputError("give DST, the directory to write")
    for source in (args.source, getattr(args, "pre_buffer_from", None)):
        _refuse_overlap(source, args.target)
    run(args)
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


def log(message: str) -> None:
    print(message, file=sys.stderr)


def mesh_shape(text: str) -> tuple[int, ...]:
    """'1x8x1' -> (1, 8, 1)."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give the sizes of {MESH_SIZES[:3]} as in 1x8x1"
        )
    return tuple(int(size) for size in text.split("x"))
