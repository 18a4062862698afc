"""What the scheduler promises of blocks: shared prefixes and preemption."""

import pytest

from helpers.scheduler_model import (
    SHARED,
    chunks,
    expected_answer,
    make_sequence,
    new_model,
    numbers,
    question,
    run,
    text,
)

IMAGE = list(range(-30, 0))


# Prefixes.


def test_a_prefix_of_a_finished_sequence_is_found():
    model = new_model()
    run(model, question(0))
    later = question(1)
    assert chunks(run(model, later)[0]) == [(1, 12, 15)]
    assert later.num_cached_tokens == 12
    assert model.scheduler.stats().prefix_hit_tokens == 12


def test_an_answer_is_found_as_a_part_of_the_next_prompt():
    model, first = new_model(), text(0, 6, new=30)
    run(model, first)
    ids = [*first.prefix_ids, *first.output_ids, 77]
    again = make_sequence(1, ids, 1)
    run(model, again)
    # The last token was sampled, but never fed.
    assert again.num_cached_tokens == (len(ids) - 2) // 4 * 4


def test_a_prefix_under_way_is_shared_by_reference():
    model, sequences = new_model(), [question(i, new=9) for i in range(3)]
    model.add(*sequences)
    model.step()
    assert numbers(model.started) == [0]  # the others wait for what it computes
    model.step()
    assert numbers(model.started) == [0, 1, 2]
    assert len({tuple(s.blocks[:3]) for s in sequences}) == 1
    assert model.scheduler.stats().blocks_used == 3 + 3 * 1
    model.run()


def test_who_waits_for_a_prefix_does_not_wait_for_the_rest():
    model = new_model()
    long = make_sequence(0, [*SHARED, *range(1000, 1050)], 1)
    model.add(long, question(1))
    model.step()
    assert [chunks(step) for step in model.steps] == [[(0, 0, 16)]]
    assert chunks(model.step()) == [(1, 12, 15), (0, 16, 28)]
    model.run()


def test_others_go_first_while_a_sequence_waits_for_a_prefix():
    model = new_model(prefill_budget=32)
    run(model, question(0), question(1), text(2, 4))
    assert numbers(model.started) == [0, 2, 1]


def test_the_holder_of_a_prefix_may_be_cancelled():
    model = new_model()
    holder, other = make_sequence(0, [*SHARED, *range(1000, 1050)], 1), question(1)
    model.add(holder, other)
    model.step(between=lambda: model.scheduler.cancel(holder))
    model.run()
    assert other.output_ids == expected_answer(other)


def test_a_device_without_a_free_lane_is_not_waited_for():
    model, sequences = new_model(devices=2, lanes=1), [question(i, new=30) for i in range(2)]
    model.add(*sequences)
    model.step()
    assert [s.device for s in sequences] == [0, 1]
    model.run()


def test_the_device_with_the_longest_prefix_is_chosen():
    model, first = new_model(devices=2), text(0, 12)
    run(model, first, question(1))
    filler, later = text(2, 40, new=40), question(3)
    model.add(filler)
    model.step()
    run(model, later)
    assert later.num_cached_tokens == 12


def test_a_prefix_that_ends_inside_an_image_is_used():
    model = new_model()
    ids = [1, 2, *IMAGE]
    run(model, make_sequence(0, [*ids, 3, 4, 5], 1, [(2, 32)]))
    again = make_sequence(1, ids, 1, [(2, 32)])
    # The image is not cut: its last tokens see those that are cached.
    assert chunks(run(model, again)[0]) == [(1, 28, 32)]


def test_another_image_has_other_keys():
    model = new_model()
    run(model, make_sequence(0, [1, 2, *IMAGE, 3], 1, [(2, 32)]))
    other = make_sequence(1, [1, 2, *(i - 100 for i in IMAGE), 3], 1, [(2, 32)])
    run(model, other)
    assert other.num_cached_tokens == 0


def test_the_whole_prompt_is_never_cached():
    model = new_model()
    run(model, text(0, 12, new=1))
    again = make_sequence(1, text(0, 12).prefix_ids, 1)
    run(model, again)
    assert again.num_cached_tokens == 8


def test_cached_blocks_are_given_away_least_recently_used_first():
    model = new_model(num_blocks=13)
    run(model, *[text(i, 16, new=1) for i in range(3)])
    run(model, make_sequence(3, text(0, 16).prefix_ids, 1))  # used again
    run(model, text(4, 16, new=1))
    hits = []
    for number in (0, 2, 1):
        again = make_sequence(10 + number, text(number, 16).prefix_ids, 1)
        run(model, again)
        hits.append(again.num_cached_tokens)
    assert hits == [12, 12, 0]


def test_prefixes_may_be_left_alone():
    model = new_model(reuse_prefixes=False)
    sequences = [question(i) for i in range(3)]
    run(model, *sequences)
    assert [s.num_cached_tokens for s in sequences] == [0, 0, 0]
    assert model.scheduler.stats().blocks_cached == 0


# Preemption.


def test_the_youngest_is_preempted_and_answers_the_same():
    model = new_model(num_blocks=12)
    sequences = [text(i, 4, new=24) for i in range(3)]
    run(model, *sequences)
    assert sequences[0].num_preemptions == 0
    assert sequences[2].num_preemptions > 0
    stats = model.scheduler.stats()
    assert stats.preemptions == sum(s.num_preemptions for s in sequences)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_preempted_sequence_is_prefilled_with_its_outputs(depth):
    model = new_model(num_blocks=10, depth=depth, reuse_prefixes=False)
    first, second = text(0, 8, new=20), text(1, 8, new=20)
    steps = run(model, first, second)
    again = [p for step in steps for p in step.prefills if p.sequence is second][1]
    assert again.start == 0 and 8 < again.stop <= 16
    assert (model.num_drains > 0) == (depth > 0)


def test_a_preempted_sequence_finds_its_own_blocks():
    model = new_model(num_blocks=10)
    first, second = text(0, 8, new=20), text(1, 8, new=20)
    steps = run(model, first, second)
    again = [p for step in steps for p in step.prefills if p.sequence is second][1]
    assert again.start > 0
    assert second.num_cached_tokens == 0  # those of its first run


def test_nobody_is_preempted_with_tokens_in_flight():
    model, second = new_model(num_blocks=10, depth=2), text(1, 8, new=20)
    model.add(text(0, 8, new=20), second)
    while not model.num_drains:
        step = model.step()  # lands all that is in flight if the step is empty
    assert not step and not second.num_preemptions
    assert model.step() and not model.scheduler.must_drain
    assert second.num_preemptions == 1


def test_a_preempted_sequence_comes_back_before_younger_ones():
    model = new_model(num_blocks=10)
    first, second, third = text(0, 8, new=20), text(1, 8, new=20), text(2, 4, new=2)
    model.add(first, second)
    while not second.num_preemptions:
        model.step()
    model.add(third)
    model.run()
    assert second.output_ids == expected_answer(second)
    order = [p.sequence.number for step in model.steps for p in step.prefills]
    assert order.index(2) > len(order) - 1 - order[::-1].index(1)


def test_hashes_do_not_depend_on_when_tokens_became_known():
    ids = list(range(1, 18))
    whole, grown = make_sequence(0, ids), make_sequence(1, ids[:6])
    whole.hash_blocks(4)
    for count in (0, 1, 7, 11):
        grown.output_ids = ids[6 : 6 + count]
        grown.hash_blocks(4)
        assert grown.block_hashes == whole.block_hashes[: grown.num_tokens // 4]
    assert len(set(whole.block_hashes)) == 4
