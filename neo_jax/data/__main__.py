"""Check training records before a run: are they good, how long are they, how well do they pack?

python -m neo_jax.data a.jsonl,b.parquet%50 --tokenizer DIR --bad bad.jsonl --png lengths.png
"""

import argparse
import json
import os
import sys

from tqdm import tqdm

from neo_jax.data.inspect_records import Measured, draw, measure_records, summary
from neo_jax.data.mixture import Mixture
from neo_jax.data.pipeline import DataConfig
from neo_jax.data.record import require
from neo_jax.data.tokenizer import NeoTokenizer
from neo_jax.errors import InputError


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        return run(args)
    except InputError as error:
        print(f"neo_jax.data: {error}", file=sys.stderr)
        return 2


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m neo_jax.data",
        description=__doc__.split("\n")[0],
        epilog="example: python -m neo_jax.data a.jsonl,b.parquet%50 --tokenizer DIR",
    )
    defaults = DataConfig()
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="or mixtures: a.jsonl,b.parquet%%50"
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="or a checkpoint")
    parser.add_argument("--length", type=positive, default=defaults.length, help="tokens of a row")
    parser.add_argument("--num-patches", type=positive, help="of a row; default 4 a token")
    parser.add_argument("--min-pixels", type=positive, default=defaults.min_pixels)
    parser.add_argument("--max-pixels", type=positive, default=defaults.max_pixels)
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="records, evenly spread over all"
    )
    parser.add_argument("--workers", type=natural, default=0, help="processes; default 0, this one")
    parser.add_argument(
        "--show", type=natural, default=10, metavar="N", help="bad records to print"
    )
    parser.add_argument("--bad", metavar="OUT.jsonl", help="where to write all bad records' places")
    parser.add_argument("--png", metavar="OUT.png", help="draw the histograms")
    return parser.parse_args(argv)


def natural(text: str) -> int:
    if int(text) < 0:
        raise ValueError(text)
    return int(text)


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


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
    """Before the long work: outputs can be written, and would not overwrite the records."""
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
    """A line for each record that cannot be used: its place, the reason, and the kind of it."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            for one in unused:
                place, kind = mixture.where(one.number), "too long" if one.is_too_long else "bad"
                line = {"number": one.number, "place": place, "kind": kind, "reason": one.problem}
                file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
