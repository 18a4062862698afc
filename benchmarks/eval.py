"""Speed of evaluation: rows per second of a made-up benchmark, from its file to the report.

python -m benchmarks.eval
python -m benchmarks.eval --reference VLMEvalKit

Two kinds of 64 rows: MMStar's, each about a picture of its own, with answers of 8 tokens; and
POPE's, whose pictures have many questions each, here 16 of its 18, with answers of 2. Ours reads
the TSV, prepares, answers and keeps; with --reference the official model then answers the same
requests from the same checkpoint one at a time, as its evaluation loop does, from token ids and
pixels that are handed to it ready-made. What compiles is run once before; runs take turns, and the
best of each counts. On a machine with other work use --threads 1.
"""

import argparse
import base64
import csv
import functools
import itertools
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import tqdm

import neo_jax
from benchmarks.infer import MID_SIZE, SIZES, limit_processors, random_picture
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.reference import Official, code_folder
from neo_jax import InputError
from neo_jax.eval.run import Plan, evaluate

ROWS = 64


class Work(NamedTuple):
    """Rows of a benchmark."""

    benchmark: str
    file: str
    pictures: int
    new_tokens: int


WORKS = (Work("mmstar", "MMStar.tsv", 64, 8), Work("pope", "POPE.tsv", 4, 2))


def write_rows(folder: Path, work: Work, seed: int) -> None:
    """A benchmark's file, whose pictures no other seed has."""
    rng = np.random.default_rng(seed)
    sizes = (SIZES[number % len(SIZES)] for number in range(work.pictures))
    pictures = [base64.b64encode(random_picture(rng, *size)).decode() for size in sizes]
    with open(folder / work.file, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "question", "A", "B", "C", "D", "answer", "image"])
        for number in range(ROWS):
            picture = pictures[number * work.pictures // ROWS]
            choices = [f"thing {letter}" for letter in "abcd"]
            question = f"Is there a thing {10 + number} in this picture?"
            writer.writerow([number, question, *choices, "ABCD"[number % 4], picture])


class Measurement:
    """Runs of ours and of theirs, in turn, each about new pictures.

    Attributes:
      best: rows per second by whose they are and the benchmark.
      num_equal, num_compared: greedy tokens.
    """

    def __init__(self, neo: neo_jax.Pipeline, official: Official | None, slots: int, folder: Path):
        self._neo, self._official, self._folder = neo, official, folder
        self._seeds = itertools.count()
        neo.tokenizer.turn_end_id = -1  # no early end
        length = min(512, neo.config.max_position_embeddings)
        self._serve = functools.partial(neo.serve, slots=slots, max_length=length)
        self.best: dict[tuple[str, str], float] = {}
        self.num_equal = self.num_compared = 0

    def run(self, work: Work, is_counted: bool = True) -> None:
        """One of ours, then one of theirs; if not counted, only ours."""
        seed = next(self._seeds)
        data, out = (self._folder / f"{name}{seed}" for name in ("data", "run"))
        data.mkdir()
        write_rows(data, work, seed)
        c = self._neo.config
        overrides = ("system=", f"max_new_tokens={work.new_tokens}")
        overrides += (f"min_pixels={c.min_pixels}", f"max_pixels={c.max_pixels}")
        plan = Plan(work.benchmark, data, out, overrides=overrides)
        (scored,) = evaluate(plan, {"model": "benchmark"}, self._serve)
        if scored.problems:
            raise InputError(str(scored.problems[0]))
        (time,) = scored.times
        if not is_counted:
            return
        self._keep("ours", work, time["answers"] / time["seconds"])
        if self._official is None:
            return
        (asked,) = plan.works({})
        run = self._official.run([asked.record(number).request for number in range(ROWS)])
        self._keep("official", work, ROWS / run.seconds)
        for answer, wanted in zip(scored.answers, run.token_ids, strict=True):  # both by row
            self.num_equal += sum(a == b for a, b in zip(answer["token_ids"], wanted, strict=True))
            self.num_compared += len(wanted)

    def _keep(self, who: str, work: Work, rate: float) -> None:
        self.best[who, work.benchmark] = max(rate, self.best.get((who, work.benchmark), 0.0))

    def report(self) -> dict[str, dict[str, float]]:
        found = {}
        for work in WORKS:
            mine = {w: rate for (w, name), rate in self.best.items() if name == work.benchmark}
            found[work.benchmark] = {f"{who} rows/s": round(rate, 3) for who, rate in mine.items()}
            if "official" in mine:
                found[work.benchmark]["ratio"] = round(mine["ours"] / mine["official"], 2)
        return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="default: a mid-size random one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="the official VLMEvalKit")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--threads", type=int, help="processors for either; default: all")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            _run(args, Path(scratch))
    except InputError as error:
        print(f"benchmarks.eval: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace, scratch: Path) -> None:
    load_before, threads = os.getloadavg(), limit_processors(args.threads)
    if args.reference:
        code_folder(args.reference)  # what is wrong is said before gigabytes are read
    model = args.model or scratch / "mid-size"
    if args.model is None:
        write_checkpoint(model, MID_SIZE, dtype="F32")
    neo = neo_jax.load(model, dtype=args.dtype)
    official = Official(args.reference, model, neo, threads) if args.reference else None
    measured = Measurement(neo, official, args.slots, scratch)
    for work in WORKS:
        measured.run(work, is_counted=False)
    for _ in tqdm.trange(args.repetitions, unit="repetition", disable=None):
        for work in WORKS:
            measured.run(work)
    print(f"{ROWS} rows, {args.slots} slots, {threads} threads, {jax.default_backend()}")
    for name, numbers in measured.report().items():
        print(f"{name:8}", ", ".join(f"{key} {value}" for key, value in numbers.items()))
    if official:
        print(f"greedy tokens equal: {measured.num_equal} of {measured.num_compared}")
    loads = [" ".join(f"{load:.2f}" for load in at) for at in (load_before, os.getloadavg())]
    print(f"load average (1, 5, 15 minutes): {loads[0]} before, {loads[1]} after")


if __name__ == "__main__":
    sys.exit(main())
