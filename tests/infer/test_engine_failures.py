"""A program that fails costs only its own requests, and nothing wrong stays behind."""

import threading

import jax
import pytest

from helpers.golden import load_case, raises
from helpers.model_engine import (
    ask,
    assert_is_empty,
    expected_tokens,
    is_ready,
    running_engine,
    talkative,
    wait_for,
)
from neo_jax import Request, Sampling
from neo_jax.infer import programs

PROMPTS = [f"a common prefix and question {n}" for n in range(8)]


@pytest.mark.parametrize("what", ["prefill", "decode", "read"])
def test_a_failed_program_fails_its_requests_and_the_next_one_is_answered(what):
    with running_engine() as (engine, runner):
        runner.failures[what] = 1
        result = engine.submit(ask(PROMPTS[0])).result(20)
        assert result.finish_reason == "error"
        assert f"a device program failed: RuntimeError('{what} is broken')" in result.error
        for prompt in PROMPTS:
            result = engine.submit(ask(prompt)).result(20)
            assert result.token_ids == expected_tokens(prompt)
        assert_is_empty(engine)


@pytest.mark.parametrize("what", ["prefill", "decode", "read"])
def test_requests_of_other_programs_are_computed_again(what):
    """Those that the failed program did not compute give the same answer, streamed once."""
    with running_engine() as (engine, runner):
        runner.gate.clear()
        long = engine.submit(ask(talkative(80), 80))
        runner.gate.set()
        first = next(iter(long))
        runner.gate.clear()
        others = [engine.submit(ask("z" * 60 + prompt)) for prompt in PROMPTS]
        pieces = []
        reader = threading.Thread(target=lambda: pieces.extend(stream_or_error(long)))
        reader.start()
        wait_for(lambda: all(is_ready(engine, handle) for handle in others))
        runner.failures[what] = 1
        runner.gate.set()
        results = [handle.result(20) for handle in others]
        reader.join(20)
        assert not reader.is_alive()
        answers = [(long.result(), expected_tokens(talkative(80), 80))]
        answers += [
            (r, expected_tokens("z" * 60 + p)) for r, p in zip(results, PROMPTS, strict=True)
        ]
        failed = [result for result, _ in answers if result.error]
        assert 1 <= len(failed) <= 4
        for result, expected in answers:
            assert result.error or result.token_ids == expected
        if not long.result().error:
            assert "".join(pieces) == long.result().text
            assert pieces[0].startswith(first)
        assert_is_empty(engine)


def stream_or_error(handle):
    try:
        yield from handle
    except ValueError as error:
        yield str(error)


def test_a_failure_in_the_middle_of_a_prompt_leaves_none_of_it_in_the_cache():
    prompt = "a long prompt that takes several chunks of sixteen tokens, one by one"
    with running_engine() as (engine, runner):
        for what in ("prefill", "read"):
            runner.failures[what] = 1
            assert engine.submit(ask(prompt)).result(20).error
            result = engine.submit(ask(prompt)).result(20)
            assert result.usage["cached_tokens"] == 0
            assert result.token_ids == expected_tokens(prompt)
            again = engine.submit(ask(prompt)).result(20)
            assert again.usage["cached_tokens"] > 60
            assert again.token_ids == expected_tokens(prompt)


def test_without_a_new_state_all_requests_fail_and_no_more_are_taken():
    with running_engine(slots=1) as (engine, runner):
        runner.failures |= {"decode": 1, "rebuild": 1}
        runner.gate.clear()
        handles = [engine.submit(ask(prompt)) for prompt in PROMPTS]
        runner.gate.set()
        errors = {handle.result(20).error for handle in handles}
        assert len(errors) == 2  # of its own program, and for all others
        assert any("a device program failed: RuntimeError('decode" in text for text in errors)
        assert any("the engine has stopped" in text and "rebuild" in text for text in errors)
        engine._core.join(20)
        assert engine.is_closed
        with raises("the engine has stopped", "rebuild is broken"):
            engine.submit(ask("more"))
        assert_is_empty(engine)


def test_a_mistake_in_the_scheduler_leaves_nobody_waiting(monkeypatch):
    with running_engine() as (engine, runner):
        runner.gate.clear()
        handles = [engine.submit(ask(prompt, 60)) for prompt in PROMPTS]
        wait_for(lambda: all(is_ready(engine, handle) for handle in handles))

        def schedule():
            raise RuntimeError("no schedule")

        monkeypatch.setattr(engine._core._scheduler, "schedule", schedule)
        runner.gate.set()
        for handle in handles:
            assert "no schedule" in handle.result(20).error
        with raises("the engine has stopped"):
            engine.submit(ask("more"))


def test_a_program_that_cannot_be_compiled_says_so_and_costs_no_request():
    with running_engine() as (engine, runner):
        handle = engine.submit(ask(talkative(60), 60))
        next(iter(handle))
        runner.failures["warm"] = 1
        with pytest.raises(RuntimeError, match=r"cannot be compiled or run.*warm is broken"):
            engine.warm()
        assert handle.result(20).token_ids == expected_tokens(talkative(60), 60)
        assert engine.warm() == 0


# With the programs themselves.

OPTIONS = {"slots": 2, "max_length": 128, "block_size": 32, "prefill_budget": 32}


@pytest.fixture(scope="module")
def neo():
    return load_case("generate")


def failing(name, takes_state):
    """A program that fails once, before or after its state is given away."""
    program, calls = getattr(programs, name), []

    def run(config, params, state, given):
        calls.append(name)
        if len(calls) > 1:
            return program(config, params, state, given)
        if takes_state:
            jax.tree.map(lambda leaf: leaf.delete(), state)
        raise RuntimeError("out of memory")

    return run


@pytest.mark.slow
@pytest.mark.parametrize("takes_state", [False, True])
@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_after_a_failed_program_the_same_question_is_answered_right(
    neo, monkeypatch, name, takes_state
):
    # Several chunks of 32 tokens, so that a prefix would be found.
    request = Request("How many boats are there? " * 8, sampling=Sampling(max_new_tokens=6))
    right = neo.engine(**OPTIONS, reuse_prefixes=False).submit(request).result()
    engine = neo.engine(**OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(programs, name, failing(name, takes_state))
        failed = engine.submit(request).result()
        assert "a device program failed" in failed.error
        assert "out of memory" in failed.error
        second = engine.submit(request).result()
    assert second.usage["cached_tokens"] == 0
    assert second.token_ids == right.token_ids
    third = engine.submit(request).result()
    assert third.usage["cached_tokens"] >= 64
    assert third.token_ids == right.token_ids
    assert engine.stats()["blocks_used"] == 0


def test_after_an_engine_that_has_stopped_the_next_call_makes_another(neo, monkeypatch):
    engine = neo.engine(**OPTIONS)
    right = neo.chat("Hello", max_new_tokens=4)
    with monkeypatch.context() as patch:
        patch.setattr(programs, "decode", failing("decode", True))

        def out_of_memory(*given):
            raise RuntimeError("no memory for a pool")

        patch.setattr(engine._runner, "_new_state", out_of_memory)
        with raises("a device program failed"):
            neo.chat("Hello", max_new_tokens=4)
        wait_for(lambda: engine.is_closed)
    assert neo.chat("Hello", max_new_tokens=4) == right
    assert neo.engine(**OPTIONS) is not engine
