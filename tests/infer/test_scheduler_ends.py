"""What the scheduler promises when sequences are cancelled and when programs fail."""

import pytest

from helpers.scheduler_model import (
    chunks,
    expected_answer,
    make_sequence,
    new_model,
    question,
    run,
    text,
)
from neo_jax.infer.scheduler import Status

# Cancellation.


def cancelled(model, sequence):
    model.scheduler.cancel(sequence)
    assert sequence.status is Status.FINISHED
    model.run()
    assert model.scheduler.stats().blocks_used == 0


def test_waiting_sequences_are_cancelled():
    model, sequence = new_model(), text(0, 8)
    model.add(sequence)
    cancelled(model, sequence)
    assert model.steps == []


def test_sequences_that_wait_for_a_prefix_are_cancelled():
    model, first, second = new_model(), question(0), question(1)
    model.add(first, second)
    model.step()
    assert model.scheduler.stats().waiting == 1
    cancelled(model, second)
    assert model.scheduler.stats().waiting == 0


def test_sequences_between_two_chunks_are_cancelled():
    model, sequence = new_model(), text(0, 30)
    model.add(sequence)
    model.step()
    cancelled(model, sequence)
    assert len(model.steps) == 1


def test_decoding_sequences_are_cancelled_with_tokens_in_flight():
    model, sequence = new_model(depth=2), text(0, 5, new=30)
    model.add(sequence)
    for _ in range(4):
        model.step()
    assert sequence.num_in_flight == 2
    known = list(sequence.output_ids)
    cancelled(model, sequence)
    assert (sequence.output_ids, sequence.num_in_flight) == (known, 0)


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_scheduled_sequences_are_cancelled_when_their_step_is_committed(steps):
    model, sequence = new_model(), text(0, 20, new=30)
    model.add(sequence, text(1, 4))
    for _ in range(steps):
        model.step()

    def cancel():
        model.scheduler.cancel(sequence)
        assert sequence.blocks  # the runner still needs them

    model.step(between=cancel)
    assert sequence.blocks == []
    cancelled(model, sequence)


def test_preempted_sequences_are_cancelled():
    model = new_model(num_blocks=10)
    first, second = text(0, 8, new=20), text(1, 8, new=20)
    model.add(first, second)
    while not second.num_preemptions:
        model.step()
    cancelled(model, second)
    assert first.output_ids == expected_answer(first)


def test_finished_sequences_may_be_cancelled_again():
    model, sequence = new_model(), text(0, 8)
    run(model, sequence)
    cancelled(model, sequence)


# Commit and failure.


def test_nothing_is_found_before_its_step_is_committed():
    scheduler, first = new_model().scheduler, question(0)
    scheduler.add(first)
    assert scheduler.schedule()
    assert (first.num_computed_tokens, first.num_in_flight, first.is_prefilled) == (0, 0, False)
    assert scheduler.stats().blocks_used == 4
    with pytest.raises(RuntimeError, match="commit the last step"):
        scheduler.schedule()
    assert scheduler.reset() == [first]  # as its dispatch has failed
    assert scheduler.stats().blocks_cached == 0
    scheduler.add(question(1))
    assert chunks(scheduler.schedule()) == [(1, 0, 15)]


def test_after_a_failure_everything_is_empty_and_goes_on():
    model = new_model(lanes=2, num_blocks=14)
    running, waiting = [text(i, 8, new=20) for i in range(2)], [question(i) for i in (2, 3)]
    model.add(*running, *waiting)
    for _ in range(4):
        model.step()
    assert model.scheduler.reset() == running
    model.drop_in_flight()
    stats = model.scheduler.stats()
    assert (stats.running, stats.waiting, stats.blocks_used, stats.blocks_cached) == (0, 2, 0, 0)
    assert all(s.status is Status.FINISHED and not s.blocks for s in running)
    model.scheduler.add(running[1])  # tried again, with the tokens known by then
    model.run()
    for sequence in (running[1], *waiting):
        assert sequence.output_ids == expected_answer(sequence)


def test_who_waits_for_a_prefix_survives_a_failure():
    model = new_model()
    first, second = (make_sequence(i, [*range(1, 40), 100 + i], 2) for i in range(2))
    model.add(first, second)
    model.step()
    assert model.scheduler.reset() == [first]
    model.drop_in_flight()
    assert chunks(model.step()) == [(1, 0, 16)]
    model.run()
    assert second.output_ids == expected_answer(second)
