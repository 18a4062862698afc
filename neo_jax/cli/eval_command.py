"""Evaluates on benchmarks: predictions, scores and a report. A stopped run can be continued."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

import neo_jax
from neo_jax.cli.model_options import add_engine_options, add_model_options, engine_options
from neo_jax.command_line import make_parser
from neo_jax.errors import InputError
from neo_jax.eval.benchmarks import TABLE
from neo_jax.eval.multihost import Hosts, config_of, join, local_mesh
from neo_jax.eval.run import Plan, evaluate, score_run, show
from neo_jax.eval.score_predictions import ScoredBenchmark
from neo_jax.eval.settings import PRESETS, make_settings
from neo_jax.infer.request import Request, Result
from neo_jax.model_config import ModelConfig

EPILOG = """
example: %(prog)s --model DIR --bench mmstar,docvqa --data DATA --out RUN --limit 100
         %(prog)s --out RUN --score-only
         %(prog)s --list
name=value sets system, prefix, min_pixels, max_pixels, num_frames, fps, temperature, top_k, top_p,
repetition_penalty, max_new_tokens, seed and so on, for all benchmarks of the run.
"""


def main(argv: list[str], prog: str) -> int:
    parser = make_parser(prog, __doc__, EPILOG)
    add_model_options(parser, required=False)
    add = parser.add_argument
    add("--bench", default="", metavar="A,B", help="names or groups; see --list")
    add("--data", type=Path, metavar="DIR", help="folder with a file or folder for each of them")
    add("--media", type=Path, metavar="DIR", help="images and videos, if elsewhere")
    add("--out", type=Path, metavar="RUN", help="folder for predictions and the report")
    add("--preset", choices=PRESETS, default="greedy")
    add("--limit", type=int, metavar="N", help="only the first rows of each")
    add("--score-only", action="store_true", help="score the predictions in RUN; no model")
    add("--retry-errors", action="store_true", help="ask the failed rows again")
    add("--list", action="store_true", help="the benchmarks and their files")
    add_engine_options(parser)
    add("--pod", action="store_true", help="one host of a pod; the cloud lists the others")
    add("settings", nargs="*", metavar="name=value")
    return run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    if args.list:
        for one in TABLE:
            print(f"{one.name:15} {one.group:8} {one.files[0]:26} {one.source}")
        return 0
    if args.out is None:
        raise InputError("give --out RUN, the folder for predictions and the report")
    if args.score_only:
        return _print_summary(score_run(args.out), args.out)
    for name in ("model", "data", "bench"):
        if not getattr(args, name):
            raise InputError(f"give --{name}, or --score-only for answers that are there")
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit {args.limit}: use 1 or more")
    make_settings("image", args.preset, {}, args.settings)  # reports bad settings first
    plan = Plan(
        args.bench, args.data, args.out, args.preset, args.settings, args.media, args.limit,
        args.retry_errors,
    )  # fmt: skip
    model = {
        "directory": str(Path(args.model).resolve()),
        **{name: getattr(args, name) for name in ("dtype", "weights", "kv_dtype")},
    }
    plan.files()  # reports missing files before anything is loaded or written
    config = config_of(args.model)
    hosts = join(args.pod)
    with contextlib.ExitStack() as bars:
        scored = evaluate(plan, model, _server(args, config, hosts), hosts, _progress(bars, hosts))
    return _print_summary(scored, args.out) if hosts.index == 0 else 0


def _server(args: argparse.Namespace, config: ModelConfig, hosts: Hosts):
    loaded: list[neo_jax.Pipeline] = []

    def serve(requests: Iterator[Request]) -> Iterator[tuple[int, Result]]:
        if not loaded:  # only if a row has no answer yet
            mesh = local_mesh(config) if hosts.count > 1 else None
            options = {"dtype": args.dtype, "weights": args.weights, "mesh": mesh}
            loaded.append(neo_jax.load(args.model, **options))
        (neo,) = loaded
        largest = make_settings("image", args.preset, {}, args.settings).max_pixels
        return neo.serve(requests, max_pixels=largest, **engine_options(args))

    return serve


def _progress(bars: contextlib.ExitStack, hosts: Hosts):
    def bar_for(name: str):
        bar = bars.enter_context(
            tqdm(desc=name, unit=" rows", mininterval=1, disable=hosts.index > 0 or None)
        )

        def show_counts(counts):
            bar.total, bar.n = counts.total, counts.kept + counts.written
            bar.set_postfix(failed=counts.failed)

        return show_counts

    return bar_for


def _print_summary(scored: Sequence[ScoredBenchmark], out: Path) -> int:
    for line in show(scored):
        print(line)
    print(f"see {out / 'report.md'} and {out / 'report.html'}")
    failed = sum(len(one.problems) for one in scored)
    if failed:
        print(f"{failed} rows have problems; see the report", file=sys.stderr)
    return 0
