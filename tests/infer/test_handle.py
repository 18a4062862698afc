"""Handles: pieces as they come, limits of time, cancelling at every stage, asyncio."""

import asyncio
import threading
import time

import pytest

from helpers.golden import raises
from helpers.model_engine import (
    ask,
    assert_is_empty,
    expected_tokens,
    is_ready,
    prepare,
    running_engine,
    talkative,
    wait_for,
)
from neo_jax import Request, Result, Sampling
from neo_jax.infer.handle import RequestHandle

LONG = "a prompt of several chunks, each of which has sixteen tokens"
USAGE = {"prompt_tokens": 1, "cached_tokens": 0, "completion_tokens": 1}


@pytest.fixture
def running():
    with running_engine(slots=1, workers=1) as (engine, runner):
        yield engine, runner
        wait_for(lambda: engine.stats()["blocks_used"] == 0)
        assert engine.submit(ask("afterwards")).result(20).token_ids == expected_tokens(
            "afterwards"
        )
        assert_is_empty(engine)


def new_handle(**sampling):
    cancelled = []
    return RequestHandle(Request("?", sampling=Sampling(**sampling)), cancelled.append), cancelled


def result(text, reason="stop", error=None):
    return Result(text, (1,), reason, USAGE, error)


def test_a_piece_is_given_once_and_only_when_it_is_certain():
    handle, _ = new_handle(stop=("END",))
    pieces = iter(handle)
    handle.update(" one ")
    assert next(pieces) == "one"
    handle.update(" one two E")  # may become the stop text
    assert next(pieces) == " two"
    handle.update(" one two Else")
    assert next(pieces) == " Else"
    handle.finish(result("one two Else"))
    assert list(pieces) == []
    assert list(handle) == ["one two Else"]


def test_the_first_result_counts():
    handle, cancelled = new_handle()
    handle.finish(result("first"))
    handle.finish(result("second"))
    handle.cancel()
    assert handle.result().text == "first"
    assert cancelled == []


def test_waiting_for_a_result_has_a_limit():
    handle, _ = new_handle()
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"0\.05 seconds"):
        handle.result(timeout=0.05)
    assert 0.04 < time.monotonic() - start < 5
    handle.finish(result("answer"))
    assert handle.result(timeout=0).text == "answer"


def test_an_error_is_raised_where_text_is_read_and_told_in_the_result():
    handle, _ = new_handle()
    handle.update("begun")
    handle.finish(result("begun", "error", "a device program failed"))
    with raises("a device program failed"):
        list(handle)
    assert handle.result().error == "a device program failed"


def test_callbacks_are_called_once_before_or_after_the_end():
    handle, _ = new_handle()
    called = []
    handle.add_done_callback(called.append)
    assert called == []
    handle.finish(result("answer"))
    handle.add_done_callback(called.append)
    assert called == [handle, handle]


def test_what_is_not_begun_is_cancelled(running):
    engine, _ = running
    may_go_on = threading.Event()
    first = engine.submit(ask("slow"), lambda request: may_go_on.wait() and prepare(request))
    second = engine.submit(ask("not begun"))
    for handle in (second, first):
        handle.cancel()
        assert handle.result(20) == Result("", (), "cancelled", dict.fromkeys(USAGE, 0))
    may_go_on.set()


def test_what_waits_is_cancelled(running):
    engine, runner = running
    runner.gate.clear()
    first, second = engine.submit(ask("first", 30)), engine.submit(ask("second"))
    wait_for(lambda: is_ready(engine, second))
    second.cancel()
    runner.gate.set()
    assert second.result(20).finish_reason == "cancelled"
    assert second.result().token_ids == ()
    assert first.result(20).token_ids == expected_tokens("first", 30)


def test_what_is_prefilled_is_cancelled(running):
    engine, runner = running
    runner.gate.clear()
    handle = engine.submit(ask(LONG))
    wait_for(lambda: is_ready(engine, handle))
    handle.cancel()
    runner.gate.set()
    assert handle.result(20).finish_reason == "cancelled"
    assert handle.result().token_ids == ()
    chunks = [chunk for step in runner.steps for chunk in step.prefills]
    assert chunks[-1].stop < len(LONG)
    again = engine.submit(ask(LONG)).result(20)
    assert again.token_ids == expected_tokens(LONG)


def test_what_is_decoded_is_cancelled_and_keeps_its_text(running):
    engine, _ = running
    handle = engine.submit(ask(talkative(100), 100))
    pieces = iter(handle)
    first = next(pieces)
    handle.cancel()
    answer = handle.result(20)
    if answer.finish_reason == "cancelled":
        assert 0 < len(answer.token_ids) < 100
    assert answer.token_ids == expected_tokens(talkative(100), 100)[: len(answer.token_ids)]
    assert first + "".join(pieces) == answer.text


def test_what_is_done_is_not_cancelled(running):
    engine, _ = running
    handle = engine.submit(ask("done"))
    answer = handle.result(20)
    handle.cancel()
    assert handle.result() == answer
    assert answer.token_ids == expected_tokens("done")


def test_asyncio_waits_for_many_at_once(running):
    engine, _ = running

    async def answer(prompt):
        handle = engine.submit(ask(prompt, 20))
        text = "".join([piece async for piece in handle])
        assert (await handle.aresult()).text == text
        assert [piece async for piece in handle] == [text]
        return (await handle.aresult()).token_ids

    async def many():
        return await asyncio.gather(*[answer(f"question {n}") for n in range(20)])

    answers = asyncio.run(asyncio.wait_for(many(), 30))
    assert answers == [expected_tokens(f"question {n}", 20) for n in range(20)]


def test_an_asyncio_reader_that_goes_away_costs_nothing(running):
    engine, runner = running

    async def leave():
        runner.gate.clear()
        handle = engine.submit(ask(talkative(60), 60))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(handle.aresult(), 0.05)
        runner.gate.set()
        async for _ in handle:
            return handle

    handle = asyncio.run(leave())  # its loop is closed now
    assert handle.result(20).token_ids == expected_tokens(talkative(60), 60)
