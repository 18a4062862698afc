"""Checks training records before a run: bad ones, lengths, and how well they pack."""

import argparse
import json
import os

from tqdm import tqdm

from neo_jax.command_line import make_parser, non_negative_int, positive_int
from neo_jax.data.inspect_records import Measured, draw, measure_records, summary
from neo_jax.data.mixture import Mixture
from neo_jax.data.pipeline import DataConfig
from neo_jax.data.record import require
from neo_jax.data.tokenizer import NeoTokenizer
from neo_jax.errors import InputError

EPILOG = "example: %(prog)s a.jsonl,b.parquet%%50 --tokenizer DIR --bad bad.jsonl --png lengths.png"


def main(argv: list[str], prog: str) -> int:
    defaults = DataConfig()
    parser = make_parser(prog, __doc__, EPILOG)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="or mixtures: a.jsonl,b.parquet%%50")
    add("--tokenizer", required=True, metavar="DIR", help="or a checkpoint")
    add("--length", type=positive_int, default=defaults.length, help="tokens of a row")
    add("--num-patches", type=positive_int, help="of a row; default 4 a token")
    add("--min-pixels", type=positive_int, default=defaults.min_pixels)
    add("--max-pixels", type=positive_int, default=defaults.max_pixels)
    add("--limit", type=positive_int, metavar="N", help="records, evenly spread over all")
    add("--workers", type=non_negative_int, default=0, help="processes; default 0, this one")
    add("--show", type=non_negative_int, default=10, metavar="N", help="bad records to print")
    add("--bad", metavar="OUT.jsonl", help="write the places of all bad records")
    add("--png", metavar="OUT.png", help="draw the histograms")
    return run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    mixture = Mixture.parse(",".join(args.files))
    config = DataConfig(
        length=args.length,
        num_patches=args.num_patches or 0,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
    )
    limits = config.limits()
    tokenizer = NeoTokenizer.from_directory(args.tokenizer)
    check_outputs(args, mixture)
    count, found = measure_records(
        mixture, tokenizer, limits, most=args.limit, workers=args.workers
    )
    measured = list(tqdm(found, total=count, unit=" records", mininterval=1))
    unused = [one for one in measured if one.problem]
    print(summary(measured, limits, config.packing_rows))
    for one in unused[: args.show]:
        print(f"{mixture.where(one.number)}: {one.problem}")
    if len(unused) > args.show:
        print(f"... and {len(unused) - args.show:,} more; --bad OUT.jsonl writes all")
    if args.bad:
        write_unused(args.bad, mixture, unused)
    if args.png:
        draw(measured, args.png)
    return 1 if any(not one.is_too_long for one in unused) else 0


def check_outputs(args: argparse.Namespace, mixture: Mixture) -> None:
    """Raises InputError if an output cannot be written, or would overwrite the records."""
    sources = [source.records.name for source in mixture.sources]
    for path in filter(None, (args.bad, args.png)):
        if any(os.path.exists(name) and same_file(path, name) for name in sources):
            raise InputError(f"{path}: has the records, name another file to write")
        try:
            open(path, "ab").close()
        except OSError as error:
            raise InputError(f"{path}: cannot write: {error.strerror}") from error
    if args.png:
        require("matplotlib.figure", "neo-ov-jax[plots]", args.png)


def same_file(path: str, name: str) -> bool:
    return os.path.exists(path) and os.path.samefile(path, name)


def write_unused(path: str, mixture: Mixture, unused: list[Measured]) -> None:
    """Writes a line for each record that cannot be used: its number, place, kind and reason."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            for one in unused:
                place, kind = mixture.where(one.number), "too long" if one.is_too_long else "bad"
                line = {"number": one.number, "place": place, "kind": kind, "reason": one.problem}
                file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror}") from error
