"""Speed of evaluation: rows per second of a synthetic benchmark, from its file to the report.

python -m benchmarks.eval
python -m benchmarks.eval --reference VLMEvalKit

Two workloads of 64 rows. MMStar: an image for each row, answers of 8 tokens. POPE: 16 questions
about each image (the benchmark has 18), answers of 2 tokens. Our time includes reading the TSV,
preprocessing, inference and writing the answers. With --reference the official model answers the
same requests from the same checkpoint, one at a time as its evaluation loop does; it gets token ids
and pixels, so its time includes no preprocessing. A first run of each compiles and is not counted.
Ours and the official run alternate, and the best of each counts. On a machine with other work use
--threads 1.
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
from benchmarks.infer import MID_SIZE, SIZES, limit_processors, random_image
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.reference import Official, code_folder
from neo_jax import InputError
from neo_jax.eval.run import Plan, evaluate

ROWS = 64


class Workload(NamedTuple):
    """The rows of a synthetic benchmark."""

    benchmark: str
    file: str
    num_images: int
    new_tokens: int


WORKLOADS = (Workload("mmstar", "MMStar.tsv", 64, 8), Workload("pope", "POPE.tsv", 4, 2))


def write_rows(folder: Path, workload: Workload, seed: int) -> None:
    """Writes a benchmark's file; the seed makes its images unique, so no prefix is reused."""
    rng = np.random.default_rng(seed)
    sizes = (SIZES[number % len(SIZES)] for number in range(workload.num_images))
    images = [base64.b64encode(random_image(rng, *size)).decode() for size in sizes]
    with open(folder / workload.file, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "question", "A", "B", "C", "D", "answer", "image"])
        for number in range(ROWS):
            image = images[number * workload.num_images // ROWS]
            choices = [f"thing {letter}" for letter in "abcd"]
            question = f"Is there a thing {10 + number} in this image?"
            writer.writerow([number, question, *choices, "ABCD"[number % 4], image])


class Measurement:
    """Alternating runs of our evaluation and the official model, each on new images.

    Attributes:
      best: the best rows per second, by ("ours" or "official", benchmark).
      num_equal, num_compared: greedy tokens of both.
    """

    def __init__(self, neo: neo_jax.Pipeline, official: Official | None, slots: int, folder: Path):
        self._neo, self._official, self._folder = neo, official, folder
        self._seeds = itertools.count()
        neo.tokenizer.turn_end_id = -1  # no early end
        length = min(512, neo.config.max_position_embeddings)
        self._serve = functools.partial(neo.serve, slots=slots, max_length=length)
        self.best: dict[tuple[str, str], float] = {}
        self.num_equal = self.num_compared = 0

    def run(self, workload: Workload, is_counted: bool = True) -> None:
        """Runs ours, then the official model; a run that is not counted is ours alone."""
        seed = next(self._seeds)
        data, out = (self._folder / f"{name}{seed}" for name in ("data", "run"))
        data.mkdir()
        write_rows(data, workload, seed)
        c = self._neo.config
        overrides = ("system=", f"max_new_tokens={workload.new_tokens}")
        overrides += (f"min_pixels={c.min_pixels}", f"max_pixels={c.max_pixels}")
        plan = Plan(workload.benchmark, data, out, overrides=overrides)
        (scored,) = evaluate(plan, {"model": "benchmark"}, self._serve)
        if scored.problems:
            raise InputError(str(scored.problems[0]))
        (time,) = scored.times
        if not is_counted:
            return
        self._keep("ours", workload, time["answers"] / time["seconds"])
        if self._official is None:
            return
        (task,) = plan.tasks({})
        run = self._official.run([task.record(number).request for number in range(ROWS)])
        self._keep("official", workload, ROWS / run.seconds)
        for answer, wanted in zip(scored.answers, run.token_ids, strict=True):  # both by row
            self.num_equal += sum(a == b for a, b in zip(answer["token_ids"], wanted, strict=True))
            self.num_compared += len(wanted)

    def _keep(self, who: str, workload: Workload, rate: float) -> None:
        key = who, workload.benchmark
        self.best[key] = max(rate, self.best.get(key, 0.0))

    def report(self) -> dict[str, dict[str, float]]:
        """Rows per second by benchmark and runner, and their ratio."""
        found = {}
        for benchmark in (workload.benchmark for workload in WORKLOADS):
            rates = {who: rate for (who, name), rate in self.best.items() if name == benchmark}
            found[benchmark] = {f"{who} rows/s": round(rate, 3) for who, rate in rates.items()}
            if "official" in rates:
                found[benchmark]["ratio"] = round(rates["ours"] / rates["official"], 2)
        return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="default: random, mid-size")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="the official VLMEvalKit")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--threads", type=int, help="processors for each; default: all")
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
        code_folder(args.reference)  # reports a bad folder before gigabytes are read
    model = args.model or scratch / "mid-size"
    if args.model is None:
        write_checkpoint(model, MID_SIZE, dtype="F32")
    neo = neo_jax.load(model, dtype=args.dtype)
    official = Official(args.reference, model, neo, threads) if args.reference else None
    measured = Measurement(neo, official, args.slots, scratch)
    for workload in WORKLOADS:
        measured.run(workload, is_counted=False)
    for _ in tqdm.trange(args.repetitions, unit="repetition", disable=None):
        for workload in WORKLOADS:
            measured.run(workload)
    print(f"{ROWS} rows, {args.slots} slots, {threads} threads, {jax.default_backend()}")
    for name, numbers in measured.report().items():
        print(f"{name:8}", ", ".join(f"{key} {value}" for key, value in numbers.items()))
    if official:
        print(f"greedy tokens equal: {measured.num_equal} of {measured.num_compared}")
    loads = [" ".join(f"{load:.2f}" for load in at) for at in (load_before, os.getloadavg())]
    print(f"load average (1, 5, 15 minutes): {loads[0]} before, {loads[1]} after")


if __name__ == "__main__":
    sys.exit(main())
