"""Random requests, cancellations and pools: every answer is right, and no block is lost."""

import dataclasses
import functools

from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.scheduler_model import SchedulerModel, expected_answer, make_sequence
from neo_jax.infer.scheduler import Scheduler, Status

quick = settings(max_examples=80, deadline=None, derandomize=True)


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request that comes when so many steps have been made."""

    step: int
    ids: list[int]
    images: list[tuple[int, int]]
    max_new_tokens: int
    cancelled_at: int | None  # so many steps later
    is_between: bool  # cancelled after a step was scheduled, before it is committed


@st.composite
def prompts(draw):
    """Text and images drawn from few, so that many prefixes are shared."""
    ids, images = [], []
    for part in draw(st.lists(st.sampled_from(["text", "image"]), min_size=1, max_size=4)):
        length = draw(st.sampled_from([1, 3, 5, 8, 17]))
        which = draw(st.integers(0, 1))
        if part == "image":
            if images and images[-1][1] == len(ids):
                ids.append(1)  # neighbours would be one image
            images.append((len(ids), len(ids) + length))
            ids += [-1000 * (which + 1) - 100 * length - place for place in range(length)]
        else:
            ids += [10 * which + place % 3 for place in range(length)]
    return ids, images


@st.composite
def arrivals(draw):
    ids, images = draw(prompts())
    new = draw(st.sampled_from([40, 25, 9, 1]))
    cancelled_at = draw(st.sampled_from([None] * 8 + [0, 1, 3, 10, 20]))
    step = draw(st.sampled_from([0, 0, 1, 5, 20]))
    return Arrival(step, ids, images, new, cancelled_at, draw(st.booleans()))


@st.composite
def cases(draw):
    """(Scheduler, arrivals): the pool has room for the largest request, and a little more."""
    arriving = draw(st.lists(arrivals(), min_size=6, max_size=16))
    arriving.sort(key=lambda arrival: arrival.step)
    size = draw(st.sampled_from([4, 2, 1, 8]))
    least = max(len(arrival.ids) + arrival.max_new_tokens for arrival in arriving)
    scheduler = Scheduler(
        devices=draw(st.sampled_from([1, 1, 2, 3])),
        lanes=draw(st.sampled_from([8, 4, 2, 1])),
        num_blocks=1 + -(-least // size) + draw(st.sampled_from([0, 10, 40])) // size,
        block_size=size,
        max_length=least,
        prefill_budget=size * draw(st.sampled_from([1, 2, 4, 8])),
        reuse_prefixes=draw(st.sampled_from([True, True, False])),
        max_context_blocks=draw(st.sampled_from([None, 4])),
    )
    return scheduler, arriving


def drive(model, arriving, sequences):
    """Adds, cancels and steps until all are finished; returns who was cancelled in time."""
    cancelled = set()

    def cancel(added, clock, is_between):
        for sequence, arrival in zip(sequences[:added], arriving, strict=False):
            at = arrival.cancelled_at
            if at is None or (arrival.step + at, arrival.is_between) != (clock, is_between):
                continue
            if sequence.status is not Status.FINISHED:
                cancelled.add(sequence)
            model.scheduler.cancel(sequence)

    added = clock = 0
    while added < len(sequences) or not model.is_done:
        while added < len(sequences) and arriving[added].step <= clock:
            model.add(sequences[added])
            added += 1
        cancel(added, clock, False)
        model.step(functools.partial(cancel, added, clock, True))
        clock += 1
        assert clock < 2000
    return cancelled


@quick
@given(cases(), st.integers(0, 2))
def test_everybody_is_answered_and_no_block_is_lost(case, depth):
    scheduler, arriving = case
    model, total = SchedulerModel(scheduler, depth), scheduler.stats().blocks_free
    sequences = [
        make_sequence(i, a.ids, a.max_new_tokens, a.images) for i, a in enumerate(arriving)
    ]
    cancelled = drive(model, arriving, sequences)
    for sequence in sequences:
        assert sequence.status is Status.FINISHED
        answer = expected_answer(sequence)
        known = answer[: len(sequence.output_ids)] if sequence in cancelled else answer
        assert sequence.output_ids == known
    stats = scheduler.stats()
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    assert stats.blocks_free + stats.blocks_cached == total
    # Nobody waits for ever: each step computes a chunk or a token that somebody needs.
    runs = sum(sequence.num_preemptions + 1 for sequence in sequences)
    most = sum(sequence.max_new_tokens for sequence in sequences) + runs * 100
    assert len(model.steps) <= most


@quick
@given(
    devices=st.sampled_from([1, 2]),
    lanes=st.sampled_from([1, 2, 5]),
    extra_blocks=st.sampled_from([0, 7, 40]),
    budget=st.sampled_from([4, 8, 32]),
    length=st.sampled_from([1, 4, 11, 30]),
    steps=st.lists(st.sampled_from([0, 0, 1, 7]), min_size=8, max_size=20),
    depth=st.integers(0, 2),
)
def test_requests_of_equal_size_start_in_their_order(
    devices, lanes, extra_blocks, budget, length, steps, depth
):
    scheduler = Scheduler(
        devices=devices,
        lanes=lanes,
        num_blocks=1 + -(-(length + 9) // 4) + extra_blocks,
        block_size=4,
        max_length=length + 9,
        prefill_budget=budget,
    )
    model = SchedulerModel(scheduler, depth)
    for number, wait in enumerate(steps):
        model.add(make_sequence(number, [number + 1] * length, 9))
        for _ in range(wait):
            if not model.is_done:
                model.step()
    model.run()
    assert [sequence.number for sequence in model.started] == list(range(len(steps)))
