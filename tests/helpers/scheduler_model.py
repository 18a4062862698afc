"""A runner without a device: it executes a scheduler's steps on small numbers and checks them.

The key and value of a token is one number, made of all prefix ids up to it. So a block that was
given away too early, or found by a wrong hash, shows as a wrong number before the next token.
"""

import collections

import numpy as np

from neo_jax.infer.scheduler import Scheduler, Sequence, Status
from neo_jax.infer.sequence import num_rows

VOCABULARY = 50
STOP_TOKEN = 0
SHARED = list(range(1, 15))  # with blocks of 4 tokens three full ones


def make_sequence(number, ids, max_new_tokens=4, images=()):
    """`ids`: prefix ids; `images`: (start, stop) of visual tokens."""
    is_image = np.zeros(len(ids), bool)
    for start, stop in images:
        is_image[start:stop] = True
    return Sequence(number, np.array(ids, np.int64), is_image, max_new_tokens)


def key_values(ids) -> list[int]:
    """What the cache has to hold for these tokens."""
    values, value = [], 0
    for token in ids:
        value = hash((value, int(token)))
        values.append(value)
    return values


def next_token(value: int) -> int:
    return value % VOCABULARY


def expected_answer(sequence: Sequence) -> list[int]:
    ids, answer = sequence.prefix_ids.tolist(), []
    while len(answer) < sequence.max_new_tokens and STOP_TOKEN not in answer:
        answer.append(next_token(key_values(ids + answer)[-1]))
    return answer


class SchedulerModel:
    """Runs a scheduler.

    Args:
      depth: steps that stay in flight while the next one is scheduled.
    """

    def __init__(self, scheduler: Scheduler, depth: int = 1):
        self.scheduler, self.depth = scheduler, depth
        self.steps = []
        self.started: list[Sequence] = []  # in the order in which they first ran
        self.num_drains = 0
        self._memory = collections.defaultdict(dict)  # (device, block) -> place -> number
        self._ids: dict[Sequence, list[int]] = {}  # with tokens in flight
        self._in_flight = collections.deque()

    def add(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.scheduler.check(sequence.prompt_length, sequence.max_new_tokens)
            self._ids[sequence] = sequence.prefix_ids.tolist()
            self.scheduler.add(sequence)

    @property
    def is_done(self) -> bool:
        stats = self.scheduler.stats()
        return not (stats.running or stats.waiting or self._in_flight)

    def step(self, between=lambda: None):
        """Schedules, executes and commits one step; `between` is called before its commit."""
        running = self._running()
        step = self.scheduler.schedule()
        self._check(step, running)
        between()
        if step:
            self._in_flight.append(self._execute(step))
            self.scheduler.commit(step)
            self.steps.append(step)
        self.num_drains += self.scheduler.must_drain
        assert step or self._in_flight or self.is_done, "nothing runs and nothing will"
        self.land(self.depth if step else 0)
        return step

    def run(self, max_steps: int = 10_000):
        while not self.is_done:
            self.step()
            assert len(self.steps) < max_steps
        return self

    def land(self, keep: int) -> None:
        """Collects sampled tokens until so many steps are in flight."""
        while len(self._in_flight) > keep:
            for sequence, token in self._in_flight.popleft():
                count = len(sequence.output_ids) + 1
                is_finished = token == STOP_TOKEN or count == sequence.max_new_tokens
                self.scheduler.append(sequence, token, is_finished)

    def drop_in_flight(self) -> None:
        """As after a failed program."""
        self._in_flight.clear()
        for sequence, ids in self._ids.items():
            del ids[sequence.num_tokens :]

    def _running(self):
        return [s for s in self._ids if s.status is Status.RUNNING]

    def _execute(self, step):
        """Programs run in the order of their dispatch, so a step may be executed at once."""
        sampled = []
        for prefill in step.prefills:
            self._compute(prefill.sequence, prefill.start, prefill.stop)
            if prefill.samples:
                sampled.append(prefill.sequence)
        for sequence in step.decodes:
            self._compute(sequence, sequence.num_computed_tokens, sequence.num_computed_tokens + 1)
            sampled.append(sequence)
        return [(sequence, self._sample(sequence)) for sequence in sampled]

    def _compute(self, sequence: Sequence, start: int, stop: int) -> None:
        size, values = self.scheduler.block_size, key_values(self._ids[sequence])
        for place in range(start):
            assert self._block(sequence, place)[place % size] == values[place]
        for place in range(start, stop):
            self._block(sequence, place)[place % size] = values[place]
        for place in range(stop % size or size, size):  # a row of prefill writes its whole block
            self._block(sequence, stop - 1)[place] = None

    def _block(self, sequence: Sequence, place: int) -> dict:
        block = sequence.blocks[place // self.scheduler.block_size]
        return self._memory[sequence.device, block]

    def _sample(self, sequence: Sequence) -> int:
        ids = self._ids[sequence]
        ids.append(next_token(key_values(ids)[-1]))
        return ids[-1]

    def _check(self, step, before) -> None:
        running, scheduler = self._running(), self.scheduler
        self.started += [s for s in running if s not in self.started]
        lanes = [(s.device, s.lane) for s in running]
        assert len(set(lanes)) == len(lanes)
        owners = collections.defaultdict(list)
        for sequence in running:
            assert 0 not in sequence.blocks
            for index, block in enumerate(sequence.blocks):
                owners[sequence.device, block].append((sequence, index))
        for sharing in owners.values():
            assert len({self._prefix(sequence, index) for sequence, index in sharing}) == 1
        assert scheduler.stats().blocks_used == len(owners)
        self._check_rows(step)
        if before and not scheduler.must_drain:
            self._check_oldest(step, min(before, key=lambda s: s.number))

    def _prefix(self, sequence: Sequence, index: int):
        size = self.scheduler.block_size
        return index, tuple(self._ids[sequence][: (index + 1) * size])

    def _check_rows(self, step) -> None:
        limits, chunks = self.scheduler.limits, collections.defaultdict(list)
        for prefill in step.prefills:
            sequence, start, stop = prefill.sequence, prefill.start, prefill.stop
            assert start == sequence.num_computed_tokens < stop <= sequence.num_tokens
            assert stop <= len(sequence.blocks) * limits.block_size
            assert sequence.image_at(stop) is None
            assert prefill.samples == (stop == sequence.num_tokens)
            chunks[sequence.device].append((num_rows(start, stop, limits.block_size), sequence))
        for rows in chunks.values():
            images = [stop - start for _, s in rows for start, stop in s.images]
            most = limits.max_rows(max(images, default=0)) if len(rows) == 1 else limits.rows
            assert sum(count for count, _ in rows) <= most

    def _check_oldest(self, step, oldest: Sequence) -> None:
        """The oldest goes on in every step, and is never preempted."""
        assert oldest.status is Status.RUNNING
        if not oldest.is_prefilled:
            assert oldest in [prefill.sequence for prefill in step.prefills]
        elif len(oldest.output_ids) + oldest.num_in_flight < oldest.max_new_tokens:
            assert oldest in step.decodes


def new_model(*, depth=1, **options) -> SchedulerModel:
    """Of a scheduler whose blocks are 4 tokens, with 4 rows a step."""
    defaults = {"devices": 1, "lanes": 4, "num_blocks": 100, "block_size": 4}
    defaults |= {"max_length": 200, "prefill_budget": 16}
    return SchedulerModel(Scheduler(**defaults | options), depth)


def text(number, length, new=4):
    """A prompt that shares nothing with those of other numbers."""
    return make_sequence(number, range(1000 * number + 1, 1000 * number + 1 + length), new)


def chunks(step):
    return [(p.sequence.number, p.start, p.stop) for p in step.prefills]


def run(model, *sequences):
    """Answers sequences; returns the steps that this took."""
    before = len(model.steps)
    model.add(*sequences)
    model.run()
    assert [s.output_ids for s in sequences] == [expected_answer(s) for s in sequences]
    assert model.scheduler.stats().blocks_used == 0
    return model.steps[before:]


def numbers(sequences):
    return [sequence.number for sequence in sequences]


def question(number, new=3):
    """A prompt that shares a prefix with those of other numbers."""
    return make_sequence(number, [*SHARED, 100 + number], new)
