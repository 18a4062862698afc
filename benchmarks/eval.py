"""Speed of evaluation: rows per second of a made-up benchmark, from its file to the report.

python -m benchmarks.eval
python -m benchmarks.eval --reference VLMEvalKit

64 multiple-choice questions about as many pictures, with answers of 8 tokens. Ours reads the TSV,
prepares, answers, keeps and scores; with --reference the official model then answers the same
requests from the same checkpoint one at a time, as its evaluation loop does, from token ids and
pixels that are handed to it ready-made. What compiles is run once before; runs take turns, and the
best of each counts. On a machine with other work use --threads 1.
"""

import argparse
import base64
import csv
import functools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import tqdm

import neo_jax
from benchmarks.infer import MID_SIZE, SIZES, limit_processors, random_picture
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.reference import Official, code_folder
from neo_jax import InputError
from neo_jax.eval.run import Plan, evaluate

ROWS, NEW_TOKENS = 64, 8


def write_rows(path: Path, seed: int, rows: int) -> None:
    """An MMStar file whose pictures no other seed has."""
    rng = np.random.default_rng(seed)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "question", "A", "B", "C", "D", "answer", "image"])
        for number in range(rows):
            picture = random_picture(rng, *SIZES[number % len(SIZES)])
            choices = [f"thing {letter}" for letter in "abcd"]
            question = f"Which of these things is in picture {10 + number}?"
            image = base64.b64encode(picture).decode()
            writer.writerow([number, question, *choices, "ABCD"[number % 4], image])


class Measurement:
    """Runs of ours and of theirs, in turn, each about new pictures.

    Attributes:
      ours, theirs: rows per second, the best so far; from file to report, and of the loop.
      num_equal, num_compared: greedy tokens.
    """

    def __init__(self, neo: neo_jax.Pipeline, official: Official | None, slots: int, folder: Path):
        self._neo, self._official, self._folder, self._seed = neo, official, folder, 0
        neo.tokenizer.turn_end_id = -1  # no early end
        c = neo.config
        self._settings = (
            *("system=", f"max_new_tokens={NEW_TOKENS}"),
            *(f"min_pixels={c.min_pixels}", f"max_pixels={c.max_pixels}"),
        )
        length = min(1024, c.max_position_embeddings)
        self._serve = functools.partial(neo.serve, slots=slots, max_length=length)
        self.ours = self.theirs = 0.0
        self.num_equal = self.num_compared = 0

    def run(self, is_counted: bool = True) -> None:
        self._seed += 1
        data, out = (self._folder / f"{name}{self._seed}" for name in ("data", "run"))
        data.mkdir()
        write_rows(data / "MMStar.tsv", self._seed, ROWS)
        plan = Plan("mmstar", data, out, overrides=self._settings)
        start = time.perf_counter()
        (scored,) = evaluate(plan, {"model": "benchmark"}, self._serve)
        seconds = time.perf_counter() - start
        if scored.problems:
            raise InputError(f"{scored.problems[0]}")
        if not is_counted:
            return
        self.ours = max(self.ours, ROWS / seconds)
        if self._official is None:
            return
        (work,) = plan.works({})
        requests = [work.record(number).request for number in range(ROWS)]
        run = self._official.run(requests)
        self.theirs = max(self.theirs, ROWS / run.seconds)
        for answer, wanted in zip(scored.answers, run.token_ids, strict=True):  # both by row
            self.num_equal += sum(a == b for a, b in zip(answer["token_ids"], wanted, strict=True))
            self.num_compared += len(wanted)


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
    measured.run(is_counted=False)
    for _ in tqdm.trange(args.repetitions, unit="repetition", disable=None):
        measured.run()
    said = {
        "rows": ROWS,
        "new_tokens": NEW_TOKENS,
        "slots": args.slots,
        "threads": threads,
        "device": jax.default_backend(),
        "rows_per_second": round(measured.ours, 3),
    }
    if official:
        said["official_rows_per_second"] = round(measured.theirs, 3)
        said["ratio"] = round(measured.ours / measured.theirs, 2)
        said["greedy_tokens_equal"] = f"{measured.num_equal} of {measured.num_compared}"
    said["load_average"] = [
        [round(load, 2) for load in at] for at in (load_before, os.getloadavg())
    ]
    print(json.dumps(said, indent=2))


if __name__ == "__main__":
    sys.exit(main())
