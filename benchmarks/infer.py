"""Speed of inference: prefill, decode, prefix reuse, and many short answers about images.

python -m benchmarks.infer --quick
python -m benchmarks.infer --reference VLMEvalKit
python -m benchmarks.infer --model /tmp/neo-2b --dtype bfloat16 --quick

With --reference the official model answers the same requests from the same checkpoint, one at a
time. It is handed token ids and pixels ready-made; our times hold all preparation. Both have the
same processors, their runs take turns, and the best of all repetitions counts. A run of ours in
which something is compiled is broken off and made again.

On a machine with other work use --threads 1: PyTorch's threads wait for each other, and two on
one free processor are several times slower than one.
"""

import argparse
import dataclasses
import io
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import tqdm
from PIL import Image

import neo_jax
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.reference import Official, Run, code_folder, model_inputs
from neo_jax import InputError, Pipeline, Request, Sampling
from neo_jax.infer.engine import Engine
from neo_jax.model.neo import count_params
from neo_jax.model_config import ModelConfig

MID_SIZE = ModelConfig(
    hidden_size=512,
    intermediate_size=1536,
    num_pre_buffer_layers=2,
    num_post_llm_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
    vocab_size=32000,
    dtype="float32",
)
SIZES = ((500, 520), (640, 384), (450, 310), (400, 260))  # 256, 240, 140 and 96 visual tokens
QUESTION = "Question {}: what is at the left of this image?"


@dataclasses.dataclass(frozen=True)
class Work:
    """Some requests, the first of which has the longest prompt."""

    questions: int
    images: int
    new_tokens: int  # of each answer

    def requests(self, seed: int) -> list[Request]:
        """Of the same lengths for each seed, about images that no other seed has."""
        rng = np.random.default_rng(seed)
        sizes = itertools.islice(itertools.cycle(SIZES), self.images)
        images = itertools.cycle([random_image(rng, *size) for size in sizes])
        sampling = Sampling(max_new_tokens=self.new_tokens)
        return [
            Request(QUESTION.format(10 + number), [next(images)], sampling=sampling)
            for number in range(self.questions)
        ]


def random_image(rng: np.random.Generator, width: int, height: int) -> bytes:
    colours = rng.integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((width, height)).save(file, "JPEG")
    return file.getvalue()


class Ours:
    """neo_jax, with a cache no longer than `longest` needs."""

    def __init__(self, neo: Pipeline, longest: Work):
        neo.tokenizer.turn_end_id = -1  # no early end
        self._neo, self._seeds, self._compiled = neo, itertools.count(), 0
        ids, _, _ = model_inputs(neo, longest.requests(0)[0])
        self.max_length = 64 * -(-(len(ids) + longest.new_tokens) // 64)
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, *_, **__) -> None:
        self._compiled += event == "/jax/core/compile/backend_compile_duration"

    def run(self, work: Work, slots: int, reuse: bool = True) -> tuple[list[Request], Run]:
        """The requests, with a seed of their own, and what came of them."""
        options = {"slots": slots, "max_length": self.max_length, "reuse_prefixes": reuse}
        while True:
            engine, requests = self._neo.engine(**options), work.requests(next(self._seeds))
            if run := self._answered(engine, requests):
                return requests, run

    def _answered(self, engine: Engine, requests: list[Request]) -> Run | None:
        """None if something was compiled."""
        compiled, start = self._compiled, time.perf_counter()
        handles = [engine.submit(request) for request in requests]
        results = [handle.result() for handle in handles]
        seconds = time.perf_counter() - start
        if self._compiled > compiled:
            return None
        for result in results:
            if result.error:
                raise InputError(result.error)
        prompt_tokens = sum(result.usage["prompt_tokens"] for result in results)
        token_ids = [list(result.token_ids) for result in results]
        times = [[at - start for at in handle.token_times] for handle in handles]
        return Run(seconds, prompt_tokens, token_ids, times)


class Measurements:
    """The least seconds of each, by name, over all repetitions.

    Attributes:
      best: seconds; theirs are named "official ...".
      num_compared, num_equal: tokens that both generated.
    """

    def __init__(self, ours: Ours, official: Official | None, works: dict[str, Work], slots):
        self._ours, self._official, self._works, self._slots = ours, official, works, slots
        self.best: dict[str, float] = {}
        self.num_compared = self.num_equal = 0

    def repeat(self) -> None:
        """Each of ours once, and each of theirs right after."""
        most = self._slots[-1]
        for slots in self._slots:
            requests, run = self._ours.run(self._works["prefill"], slots)
            self._keep(f"prefill {slots}", run.seconds_per_prompt_token)
        self._compare("prefill", requests, run, lambda run: run.seconds_per_prompt_token)
        for slots in self._slots:
            work = dataclasses.replace(self._works["decode"], questions=slots, images=slots)
            requests, run = self._ours.run(work, slots)
            self._keep(f"decode {slots}", run.seconds_per_new_token)
        self._compare("decode", requests[:1], run, lambda run: run.seconds_per_new_token)
        _, run = self._ours.run(self._works["one image"], most, reuse=False)
        self._keep("one image, no reuse", run.seconds)
        for name in ("one image", "end to end"):
            requests, run = self._ours.run(self._works[name], most)
            self._keep(name, run.seconds)
            self._compare(name, requests, run, lambda run: run.seconds)

    def _keep(self, name: str, seconds: float) -> None:
        self.best[name] = min(seconds, self.best.get(name, seconds))

    def _compare(
        self, name: str, requests: list[Request], ours: Run, value: Callable[[Run], float]
    ) -> None:
        if self._official is None:
            return
        theirs = self._official.run(requests)
        self._keep(f"official {name}", value(theirs))
        for index, wanted in enumerate(theirs.token_ids):
            pairs = zip(ours.token_ids[index], wanted, strict=True)
            self.num_equal += sum(a == b for a, b in pairs)
            self.num_compared += len(wanted)

    def report(self) -> None:
        """Prints a line for each."""
        for name in ("prefill", "decode"):
            for slots in self._slots:
                seconds = self.best[f"{name} {slots}"]
                beside = self._beside(name, seconds, _rate)
                print(f"{name:12} {slots:2} slots: {_rate(seconds)}{beside}")
        for name in ("one image", "end to end"):
            work, seconds, extra = self._works[name], self.best[name], ""
            if anew := self.best.get(f"{name}, no reuse"):
                extra = f"; without prefix reuse {_time(anew)}, ratio {anew / seconds:.2f}"
            print(
                f"{name:12} {self._slots[-1]:2} slots: {_time(seconds)} for {work.questions} "
                f"answers of {work.new_tokens} tokens{extra}{self._beside(name, seconds, _time)}"
            )
        if self._official:
            print(f"greedy tokens equal: {self.num_equal} of {self.num_compared}")

    def _beside(self, name: str, seconds: float, show: Callable[[float], str]) -> str:
        theirs = self.best.get(f"official {name}")
        return f"; official {show(theirs)}, ratio {theirs / seconds:.2f}" if theirs else ""


def _rate(seconds: float) -> str:
    return f"{1 / seconds:7.1f} tokens/s"


def _time(seconds: float) -> str:
    return f"{seconds:6.2f} s"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            run(args, Path(scratch) / "mid-size")
    except InputError as error:
        print(f"benchmarks.infer: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="default: a mid-size random one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="the official VLMEvalKit")
    parser.add_argument("--slots", type=int, nargs="+", help="default: 1 4 16; quick: 1 4")
    parser.add_argument("--repetitions", type=int, help="default: 3; quick: 1")
    parser.add_argument("--threads", type=int, help="processors for either; default: all")
    parser.add_argument("--quick", action="store_true", help="a quarter of the requests")
    args = parser.parse_args(argv)
    args.slots = sorted(args.slots or ([1, 4] if args.quick else [1, 4, 16]))
    args.repetitions = args.repetitions or (1 if args.quick else 3)
    return args


def run(args: argparse.Namespace, scratch: Path) -> None:
    load_before, threads = os.getloadavg(), limit_processors(args.threads)
    if args.repetitions < 1:
        raise InputError(f"--repetitions {args.repetitions}: use 1 or more")
    if args.reference:
        code_folder(args.reference)  # errors come before gigabytes are read
    if args.model is None:
        write_checkpoint(scratch, MID_SIZE, dtype="F32")
    neo = neo_jax.load(args.model or scratch, dtype=args.dtype)
    less = 4 if args.quick else 1
    works = {
        "prefill": Work(16 // less, 16 // less, 1),
        "decode": Work(1, 1, 32 // less),
        "one image": Work(16 // less, 1, 8),
        "end to end": Work(32 // less, 32 // less, 8),
    }
    ours, official = Ours(neo, works["decode"]), None
    print(
        f"{args.model or 'mid-size random model'}: {count_params(neo.config) / 1e6:.1f} M "
        f"parameters, {args.dtype}; {threads} threads; jax {jax.__version__} on {neo.mesh.size} "
        f"{jax.default_backend()}, {ours.max_length} tokens of cache per slot",
        flush=True,
    )
    if args.reference:
        official = Official(args.reference, args.model or scratch, neo, threads)
        official.run(Work(1, 1, 2).requests(0))  # its first run is slower
        print(official.name, flush=True)
    measurements = Measurements(ours, official, works, args.slots)
    for _ in tqdm.trange(args.repetitions, unit="repetition", disable=None):
        measurements.repeat()
    measurements.report()
    loads = [" ".join(f"{load:.2f}" for load in at) for at in (load_before, os.getloadavg())]
    print(f"load average (1, 5, 15 minutes): {loads[0]} before, {loads[1]} after")


def limit_processors(count: int | None) -> int:
    """Keeps this process, before JAX starts its threads, to `count` processors, or all it may use.

    Returns:
      how many.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if count is not None and not 1 <= count <= len(allowed):
        raise InputError(f"--threads {count}: use 1 to {len(allowed)}")
    os.sched_setaffinity(0, allowed[:count])
    return len(allowed[:count])


if __name__ == "__main__":
    sys.exit(main())
