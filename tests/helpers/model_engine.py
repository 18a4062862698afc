"""An engine without programs: thread, scheduler and handles are real, its runner computes numbers.

As in `scheduler_model.py`, the key and value of a token is a number made of all tokens up to it,
and a wrong one shows before the next token. Nothing is compiled, so tests can afford threads and
hundreds of requests.
"""

import collections
import contextlib
import functools
import threading
from unittest import mock

import numpy as np

from helpers.scheduler_model import key_values, next_token
from neo_jax.configs.models import TINY
from neo_jax.data.example import Example
from neo_jax.infer import engine as engine_module
from neo_jax.infer.prepare import Prepared
from neo_jax.infer.request import Request
from neo_jax.infer.runner import InFlight, ProgramError
from neo_jax.infer.sampling import Sampling
from neo_jax.sharding import make_mesh

OPTIONS = {"slots": 4, "max_length": 128, "pool_tokens": 400, "block_size": 4, "prefill_budget": 16}


class Tokenizer:
    turn_end_id = 0

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids)


def prepare(request: Request) -> Prepared:
    tokens = np.array([ord(letter) for letter in request.prompt], np.int32)
    length, nothing = len(tokens), np.zeros((0, 768), np.uint8)
    example = Example(tokens, np.zeros((length, 3), np.int32), np.zeros(length, bool), nothing, {})
    return Prepared(example, tokens.astype(np.int64))


def ask(prompt: str, new: int = 8) -> Request:
    return Request(prompt, sampling=Sampling(max_new_tokens=new))


@functools.cache
def expected_tokens(prompt: str, new: int = 8) -> tuple[int, ...]:
    ids, answer = [ord(letter) for letter in prompt], []
    while len(answer) < new and Tokenizer.turn_end_id not in answer:
        answer.append(next_token(key_values(ids + answer)[-1]))
    return tuple(answer)


@functools.cache
def talkative(new: int) -> str:
    """A prompt whose answer does not end before `new` tokens."""
    prompts = (f"tell {number}" for number in range(10_000))
    return next(prompt for prompt in prompts if len(expected_tokens(prompt, new)) == new)


class ModelRunner:
    """In place of `Runner`.

    Attributes:
      gate: while it is not set, the engine's thread waits before it executes a step.
      steps: that were executed.
      failures: by "prefill", "decode", "read", "rebuild" or "warm", how many of the next ones fail.
    """

    def __init__(self, config, params, mesh, pool, kv_dtype, *, limits, max_image_tokens):
        self.gate, self.steps = threading.Event(), []
        self.failures = collections.Counter()
        self.gate.set()
        self._size = pool.block_size
        self._memory = collections.defaultdict(dict)  # (device, block) -> place -> number
        self._ids = {}  # of a sequence, on the device

    def plan(self):
        return []

    def warm(self):
        self._may_fail("warm")
        return 0

    def free(self):
        self._memory = None

    def rebuild(self):
        self._may_fail("rebuild")
        self._memory, self._ids = collections.defaultdict(dict), {}

    def execute(self, step):
        self.gate.wait()
        self.steps.append(step)
        sent = []
        if step.prefills:
            sequences = [one.sequence for one in step.prefills]
            with program_of(sequences):
                self._may_fail("prefill")
                sampled = [one.sequence for one in step.prefills if self._prefill(one)]
            sent.append(self._in_flight(sampled, sequences))
        if step.decodes:
            with program_of(step.decodes):
                self._may_fail("decode")
                for sequence in step.decodes:
                    position = sequence.num_computed_tokens
                    self._compute(sequence, position, position + 1)
            sent.append(self._in_flight(step.decodes, step.decodes))
        return sent

    def _may_fail(self, what):
        if self.failures[what]:
            self.failures[what] -= 1
            self._memory = None  # as a program that has taken the state with it
            raise RuntimeError(f"{what} is broken")

    def _prefill(self, chunk):
        sequence = chunk.sequence
        if chunk.start in (0, sequence.num_cached_tokens) or sequence not in self._ids:
            self._ids[sequence] = [*sequence.prefix_ids.tolist(), *sequence.output_ids]
        self._compute(sequence, chunk.start, chunk.stop)
        return chunk.samples

    def _compute(self, sequence, start, stop):
        values, size = key_values(self._ids[sequence]), self._size

        def place(position):
            return self._memory[sequence.device, sequence.blocks[position // size]]

        for position in range(start):
            assert place(position)[position % size] == values[position]
        for position in range(start, stop):
            place(position)[position % size] = values[position]

    def _in_flight(self, sampled, sequences):
        tokens = []
        for sequence in sampled:
            tokens.append(next_token(key_values(self._ids[sequence])[-1]))
            self._ids[sequence].append(tokens[-1])
        array = np.array(tokens)
        if self.failures["read"]:
            self.failures["read"] -= 1
            array = Broken()
        return InFlight(array, list(enumerate(sampled)), sequences)


class Broken:
    def __array__(self, *args, **options):
        raise RuntimeError("read is broken")


@contextlib.contextmanager
def program_of(sequences):
    try:
        yield
    except Exception as error:
        raise ProgramError(sequences, error) from error


def make_engine(devices=1, tokenizer=None, **options):
    """An engine and its runner."""
    mesh = make_mesh((devices, 1, 1))
    with mock.patch.object(engine_module, "Runner", ModelRunner):
        engine = engine_module.Engine(
            TINY, {}, mesh, tokenizer or Tokenizer(), prepare, **OPTIONS | options
        )
    return engine, engine._runner


@contextlib.contextmanager
def running_engine(*args, **options):
    """As `make_engine`, and it is closed afterwards."""
    engine, runner = make_engine(*args, **options)
    try:
        yield engine, runner
    finally:
        runner.gate.set()
        engine.close()


def wait_for(condition, seconds=20):
    """Until it holds."""
    event = threading.Event()
    for _ in range(int(seconds * 100)):
        if condition():
            return
        event.wait(0.01)
    raise AssertionError("it did not come about")


def is_ready(engine, handle):
    """It is prepared, whether or not the scheduler has seen it."""
    return handle in engine._core._intake._held


def assert_is_empty(engine):
    stats = engine.stats()
    assert (stats["running"], stats["waiting"], stats["blocks_used"]) == (0, 0, 0)
