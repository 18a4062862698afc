"""Calls on one engine: one at a time, nothing mixed or lost, nothing prepared twice."""

import weakref

import numpy as np
import pytest
from PIL import Image

from helpers.golden import load_case, raises
from neo_jax import Request, Sampling
from neo_jax.infer import prepare

OPTIONS = {"slots": 2, "max_length": 256}
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


def test_a_stream_that_was_left_makes_way_for_the_next_call(neo):
    neo.engine(**OPTIONS)
    alone = ask(neo)
    for call in (
        ask,
        lambda neo: "".join(ask(neo, stream=True)),
        lambda neo: (
            neo.generate(
                [Request("Say something else", sampling=Sampling(max_new_tokens=8))], **OPTIONS
            )[0].text
        ),
    ):
        left = begun(neo)
        assert call(neo) == alone
        with raises("later call has ended this answer"):
            next(left)


def test_a_stream_that_was_left_keeps_no_engine(neo):
    engine = weakref.ref(neo.engine(**OPTIONS, reuse_prefixes=False))
    left = begun(neo)
    neo.engine(slots=1, max_length=256)
    assert engine() is None
    left.close()


def test_streams_one_after_the_other_are_whole(neo):
    neo.engine(**OPTIONS)
    alone = ask(neo)
    streams = [ask(neo, stream=True) for _ in range(2)]
    assert ["".join(stream) for stream in streams] == [alone, alone]


def test_a_call_amid_others_is_refused_and_they_go_on(neo):
    alone = [result.text for result in neo.generate(REQUESTS, **OPTIONS)]
    texts = {}
    for number, result in neo.serve(REQUESTS, **OPTIONS):
        texts[number] = result.text
        with raises("still answering other requests: finish or close their iterator"):
            ask(neo)
        with raises("still answering other requests"):
            neo.generate(REQUESTS, **OPTIONS)
    assert [texts[number] for number in range(4)] == alone
    assert ask(neo)


def broken_requests():
    yield REQUESTS[0]
    raise ZeroDivisionError


def test_an_engine_is_free_after_an_iterator_that_was_left_or_failed(neo):
    with pytest.raises(ZeroDivisionError):
        neo.generate(broken_requests(), **OPTIONS)
    alone = ask(neo)
    with pytest.raises(ZeroDivisionError):
        for _ in neo.serve(REQUESTS, **OPTIONS):
            raise ZeroDivisionError
    assert ask(neo) == alone
    answers = neo.serve(REQUESTS, **OPTIONS)
    next(answers)
    answers.close()
    assert ask(neo) == alone


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
