"""A file of requests to a file of answers; run it again to go on after a stop."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

import neo_jax
from neo_jax.cli.model_options import add_engine_options, add_model_options, engine_options
from neo_jax.command_line import make_parser
from neo_jax.infer import offline

EPILOG = "example: %(prog)s --model DIR in.jsonl out.jsonl"


def main(argv: list[str], prog: str) -> int:
    args = parse(argv, prog)

    def serve(requests):
        # Loaded only once both files are checked, and not if nothing is left to ask.
        neo = neo_jax.load(args.model, dtype=args.dtype, weights=args.weights)
        yield from neo.serve(requests, **engine_options(args))

    def show(counts):
        bar.total, bar.n = counts.total, counts.kept + counts.written
        bar.set_postfix(failed=counts.failed)

    names = ("system", "max_new_tokens", "min_pixels", "max_pixels")
    with tqdm(unit=" answers", mininterval=1) as bar:
        counts = offline.run_batch(
            args.source,
            args.target,
            serve,
            defaults={name: getattr(args, name) for name in names},
            settings={
                "model": str(Path(args.model).resolve()),
                "dtype": args.dtype,
                "weights": args.weights,
                "kv_dtype": args.kv_dtype,
            },
            retry_errors=args.retry_errors,
            on_progress=show,
        )
    if counts.failed:
        print(
            f"{prog}: {counts.failed} of {counts.total} failed, their lines have the reason; mend "
            "them and run again with --retry-errors",
            file=sys.stderr,
        )
    return 1 if counts.failed else 0


def parse(argv: list[str], prog: str) -> argparse.Namespace:
    parser = make_parser(prog, __doc__, EPILOG)
    add = parser.add_argument
    add("source", metavar="IN.jsonl", help="a request per line; see neo_jax/infer/request_json.py")
    add("target", metavar="OUT.jsonl", help="an answer per line, as they finish")
    add_engine_options(parser)
    add("--retry-errors", action="store_true", help="ask again where it failed")
    add("--system", help="system prompt of requests that have none")
    add("--max-new-tokens", type=int, help="of requests without their own; default 512")
    add("--min-pixels", type=int, help="area of a resized image, at least")
    add("--max-pixels", type=int, help="area of a resized image, at most")
    add_model_options(parser)
    return parser.parse_args(argv)
