"""Calls of a pipeline on its engine: from many threads, nothing mixed or lost or prepared twice."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from helpers.golden import load_case, raises
from helpers.model_engine import wait_for
from neo_jax import Request, Sampling
from neo_jax.infer import prepare

OPTIONS = {"slots": 2, "max_length": 256, "block_size": 32, "prefill_budget": 128}
REQUESTS = [Request(f"Question {i}", sampling=Sampling(max_new_tokens=4 + i)) for i in range(4)]


@pytest.fixture(scope="module")
def neo():
    return load_case("generate")


def ask(neo, **options):
    return neo.chat("Say something else", max_new_tokens=8, **options)


def begun(neo):
    stream = neo.chat("How many boats are there?", max_new_tokens=30, stream=True)
    assert next(stream)
    return stream


def texts(results):
    return [result.text for result in results]


def test_a_stream_goes_on_beside_other_calls(neo):
    neo.engine(**OPTIONS)
    alone, whole = ask(neo), neo.chat("How many boats are there?", max_new_tokens=30)
    left = neo.chat("How many boats are there?", max_new_tokens=30, stream=True)
    first = next(left)
    assert ask(neo) == alone
    request = Request("Say something else", sampling=Sampling(max_new_tokens=8))
    assert texts(neo.generate([request], **OPTIONS)) == [alone]
    assert "".join(ask(neo, stream=True)) == alone
    assert first + "".join(left) == whole


def test_a_stream_that_is_closed_ends_its_request(neo):
    engine = neo.engine(**OPTIONS)
    begun(neo).close()
    wait_for(lambda: engine.stats()["running"] == engine.stats()["blocks_used"] == 0)
    assert ask(neo)


def test_an_engine_with_other_options_takes_the_place_of_the_last(neo):
    first = neo.engine(**OPTIONS)
    left = begun(neo)
    assert neo.engine(**OPTIONS) is first
    second = neo.engine(**OPTIONS | {"slots": 1})
    assert first.is_closed
    assert "".join(left)  # it was answered to its end before
    assert neo.engine(**OPTIONS | {"slots": 1}) is second


@pytest.mark.slow
def test_a_prompt_too_long_for_the_engine_gets_a_larger_one(neo):
    engine = neo.engine(**OPTIONS)
    assert ask(neo)
    neo.chat("x" * 80, max_new_tokens=200)
    assert engine.is_closed
    with raises("exceeds the model's context"):
        neo.chat("x", max_new_tokens=10**6)


def test_calls_from_many_threads_are_answered_each_for_itself(neo):
    neo.engine(**OPTIONS)
    alone = {n: neo.chat(f"Number {n % 5}?", max_new_tokens=6) for n in range(5)}
    batch = texts(neo.generate(REQUESTS, **OPTIONS))

    def call(n):
        if n % 4 == 0:
            return texts(neo.generate(REQUESTS, **OPTIONS)) == batch
        if n % 4 == 1:
            pieces = neo.chat(f"Number {n % 5}?", max_new_tokens=6, stream=True)
            return "".join(pieces) == alone[n % 5]
        if n % 4 == 2:
            results = dict(neo.serve(REQUESTS, **OPTIONS))
            return [results[number].text for number in range(4)] == batch
        return neo.chat(f"Number {n % 5}?", max_new_tokens=6) == alone[n % 5]

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(call, range(40)))
    assert neo.engine(**OPTIONS).stats()["blocks_used"] == 0


@pytest.mark.slow
def test_other_options_amid_an_iterator_are_refused_and_it_goes_on(neo):
    alone = texts(neo.generate(REQUESTS, **OPTIONS))
    found = {}
    for number, result in neo.serve(REQUESTS, **OPTIONS):
        found[number] = result.text
        with raises("still answers other requests: finish or close their iterator"):
            neo.generate(REQUESTS, **OPTIONS | {"slots": 1})
        assert ask(neo)
    assert [found[number] for number in range(4)] == alone
    assert texts(neo.generate(REQUESTS, **OPTIONS | {"slots": 1})) == alone


def test_an_engine_is_free_after_an_iterator_that_was_left_or_failed(neo):
    def broken():
        yield REQUESTS[0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        neo.generate(broken(), **OPTIONS)
    alone = ask(neo)
    with pytest.raises(ZeroDivisionError):
        for _ in neo.serve(REQUESTS, **OPTIONS):
            raise ZeroDivisionError
    answers = neo.serve(REQUESTS, **OPTIONS)
    next(answers)
    answers.close()
    unused = neo.serve(REQUESTS, **OPTIONS)  # never begun
    assert texts(neo.generate(REQUESTS[:1], **OPTIONS | {"slots": 1}))
    assert ask(neo) == alone
    assert len(list(unused)) == len(REQUESTS)


def test_a_pipeline_that_is_dropped_frees_its_engine(neo):
    other = dataclasses.replace(neo, _engine=None, _options={}, _lock=threading.RLock())
    engine = other.engine(**OPTIONS)
    assert ask(other)
    thread, runner = engine._core._thread, engine._runner
    del other, engine
    thread.join(20)
    assert not thread.is_alive()
    assert runner._state is None
    assert runner._params is None


@pytest.mark.slow
@pytest.mark.parametrize("given", ["video", "images"])
def test_chat_prepares_a_request_once(neo, given, monkeypatch):
    calls, name = [], {"video": "load_video", "images": "resized_pixels"}[given]
    original = getattr(prepare, name)
    monkeypatch.setattr(prepare, name, lambda *a, **k: calls.append(1) or original(*a, **k))
    frame = Image.fromarray(np.full((64, 64, 3), 90, np.uint8))
    neo.engine(**OPTIONS)
    text = neo.chat("What?", **{given: [frame]}, max_new_tokens=4)
    assert len(calls) == 1
    request = Request("What?", **{given: [frame]}, sampling=Sampling(max_new_tokens=4))
    assert neo.generate([request], **OPTIONS)[0].text == text
