"""What the scheduler promises of order, chunks, admission and the budget of a step."""

import subprocess
import sys
from pathlib import Path

import pytest

from helpers.scheduler_model import chunks, make_sequence, new_model, numbers, question, run, text
from neo_jax.errors import InputError

ROOT = Path(__file__).parents[2]


def test_jax_is_not_imported():
    program = """
import sys, types
package = types.ModuleType("neo_jax")  # in place of the one that imports everything
package.__path__ = ["neo_jax"]
sys.modules["neo_jax"] = package
import neo_jax.infer.scheduler
assert not {"jax", "jaxlib", "flax"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


# Chunks.


def test_a_long_prompt_is_prefilled_chunk_by_chunk():
    steps = run(new_model(), text(0, 35, new=1))
    assert [chunks(step) for step in steps] == [[(0, 0, 16)], [(0, 16, 32)], [(0, 32, 35)]]
    assert [step.prefills[0].samples for step in steps] == [False, False, True]
    assert [all(one.start == 0 for one in step.prefills) for step in steps] == [True, False, False]


def test_a_prefilled_sequence_decodes_in_the_next_step():
    steps = run(new_model(), text(0, 5, new=3))
    assert [(len(s.prefills), numbers(s.decodes)) for s in steps] == [(1, []), (0, [0]), (0, [0])]


@pytest.mark.parametrize(
    "image, stops",
    [
        ((10, 14), [16, 30]),  # not cut
        ((10, 20), [10, 24, 30]),  # starts in the second half: stops before it
        ((3, 20), [20, 30]),  # starts in the first half: goes with the few tokens before it
        ((3, 21), [24, 30]),  # with what fills its last row
        ((0, 30), [30]),  # larger than the budget
        ((8, 16), [16, 30]),  # ends where the chunk does
        ((16, 24), [16, 30]),  # starts where the chunk ends
    ],
)
def test_no_chunk_ends_inside_an_image(image, stops):
    steps = run(new_model(), make_sequence(0, range(1, 31), 1, [image]))
    assert [step.prefills[0].stop for step in steps] == stops


def test_a_row_is_not_filled_with_a_part_of_the_next_image():
    steps = run(new_model(), make_sequence(0, range(1, 41), 1, [(1, 21), (22, 40)]))
    assert [step.prefills[0].stop for step in steps] == [21, 40]


def test_no_step_has_more_rows_than_promised():
    for before in range(20):
        for size in range(1, 60):
            model, ids = new_model(), range(1, before + size + 1)
            model.add(make_sequence(0, ids, 1, [(before, before + size)]))
            model.step()  # compares with `max_rows`


# Admission.


def test_a_request_that_cannot_fit_alone_is_refused():
    with pytest.raises(InputError, match="prompt has 190 tokens.*max_new_tokens=11.*200 tokens"):
        new_model().scheduler.check(190, 11)
    with pytest.raises(InputError, match="the 37 tokens that fit"):
        new_model(num_blocks=10).scheduler.check(30, 8)
    new_model(num_blocks=10).scheduler.check(30, 7)


def test_a_sequence_as_large_as_the_pool_is_answered():
    model = new_model(num_blocks=10)
    run(model, text(0, 20, new=17), text(1, 30, new=7))
    assert numbers(model.started) == [0, 1]


def test_lanes_limit_what_runs():
    model = new_model(lanes=2)
    steps = run(model, *[text(i, 4, new=5) for i in range(5)])
    assert max(len(step.decodes) for step in steps) == 2
    assert numbers(model.started) == [0, 1, 2, 3, 4]


def test_admission_leaves_blocks_to_grow():
    model = new_model(num_blocks=8, prefill_budget=32)
    model.add(*[text(i, 8, new=5) for i in range(3)])
    model.step()
    # Of 7 blocks, 4 are taken: two more would leave one for two that run.
    assert numbers(model.started) == [0, 1]
    model.run()
    assert model.scheduler.stats().preemptions == 0


def test_for_memory_nobody_is_passed():
    model = new_model(num_blocks=12)
    run(model, text(0, 24, new=8), text(1, 24), text(2, 1))
    assert numbers(model.started) == [0, 1, 2]


def test_the_device_with_most_free_blocks_is_chosen():
    sequences = [text(i, length) for i, length in enumerate([12, 4, 4, 9])]
    model = new_model(devices=2)
    model.add(*sequences)
    model.step()
    assert [s.device for s in sequences] == [0, 1, 1, 1]


# Budget.


def test_short_prompts_share_a_step():
    steps = run(new_model(), *[text(i, 4) for i in range(4)])
    assert chunks(steps[0]) == [(i, 0, 4) for i in range(4)]


def test_a_short_prompt_goes_beside_a_long_one():
    model = new_model()
    steps = run(model, text(0, 40), text(1, 40), text(2, 3), text(3, 4))
    assert [chunks(step) for step in steps[:3]] == [
        [(2, 0, 3), (0, 0, 12)],
        [(3, 0, 4), (0, 12, 24)],
        [(0, 24, 40)],
    ]
    assert numbers(model.started) == [0, 2, 3, 1]


def test_only_short_prompts_pass_one_that_waits_for_rows():
    model = new_model(prefill_budget=32)
    steps = run(model, text(0, 20), text(1, 40), text(2, 12), text(3, 8))
    assert [chunks(step) for step in steps[:2]] == [
        [(0, 0, 20), (3, 0, 8)],
        [(1, 0, 32)],
    ]


def test_one_that_waits_for_rows_is_passed_on_a_device_without_chunks():
    model = new_model(devices=2)
    run(model, question(0))
    first, again, third = text(1, 5), question(2), text(3, 12)
    steps = run(model, first, again, third)
    # A fresh step suits the first, so the second waits; rows of the other device would be empty.
    assert [chunks(step) for step in steps[:2]] == [[(1, 0, 5), (3, 0, 12)], [(2, 12, 15)]]
    assert numbers(model.started) == [0, 1, 3, 2]


def test_a_long_prompt_is_not_cut_for_a_short_one_if_it_ends():
    steps = run(new_model(), text(0, 16), text(1, 3))
    assert chunks(steps[0]) == [(0, 0, 16)]
    assert chunks(steps[1]) == [(1, 0, 3)]


def test_short_prompts_do_not_starve_a_long_one():
    model = new_model(lanes=2)
    model.add(text(0, 60, new=1), text(1, 60, new=1))
    for number in range(2, 60):  # more of them than are ever answered in time
        model.add(text(number, 1, new=6))
        model.step()
        if 1 in numbers(model.started):
            break
    assert len(model.steps) < 15
    model.run()


def test_a_chunk_too_small_to_be_worth_it_waits():
    steps = run(new_model(), text(0, 12), text(1, 20))
    assert [chunks(step) for step in steps[:3]] == [[(0, 0, 12)], [(1, 0, 16)], [(1, 16, 20)]]
    steps = run(new_model(), text(0, 8), text(1, 20))
    assert chunks(steps[0]) == [(0, 0, 8), (1, 0, 8)]


def test_beside_a_fresh_prompt_all_are_fresh():
    model = new_model()
    run(model, text(0, 8, new=1))
    fresh, again = make_sequence(1, [7, 7, 7], 1), make_sequence(2, text(0, 9).prefix_ids, 1)
    assert [chunks(step) for step in run(model, fresh, again)] == [[(1, 0, 3)], [(2, 8, 9)]]


def test_beside_a_continued_prompt_a_fresh_one_goes():
    model = new_model()
    run(model, text(0, 8, new=1))
    again, fresh = make_sequence(1, text(0, 9).prefix_ids, 1), make_sequence(2, [7, 7, 7], 1)
    assert [chunks(step) for step in run(model, again, fresh)] == [[(1, 8, 9), (2, 0, 3)]]


def test_the_context_of_a_step_is_limited():
    model, shared = new_model(max_context_blocks=8), list(range(1, 14))
    run(model, make_sequence(0, shared, 1))
    steps = run(model, *[make_sequence(i, [*shared, i], 1) for i in range(1, 4)])
    assert [len(step.prefills) for step in steps] == [2, 1]
