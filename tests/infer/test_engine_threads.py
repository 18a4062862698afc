"""Requests that come and go, from many threads; nothing is lost, and who waits costs nothing."""

import contextlib
import gc
import random
import threading
import time
import weakref

import pytest

from helpers.golden import raises
from helpers.model_engine import (
    Tokenizer,
    ask,
    assert_is_empty,
    expected_tokens,
    is_ready,
    make_engine,
    prepare,
    running_engine,
    talkative,
    wait_for,
)
from neo_jax.infer.result_stream import stream_results

PROMPTS = [f"{'a common prefix' if n % 2 else 'another'} and question {n}" for n in range(12)]


def in_threads(*functions):
    """Runs them at the same time; what one raises is raised here."""
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=[function]) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("devices", [1, 2])
def test_500_submits_and_200_cancels_from_8_threads_lose_nothing(devices):
    kept, cancelled, lock = [], [], threading.Lock()

    def use(engine, seed):
        rng = random.Random(seed)
        mine = []
        for _ in range(63 if seed < 4 else 62):
            request = ask(rng.choice(PROMPTS), rng.randint(1, 40))
            mine.append((request, engine.submit(request)))
            if rng.random() < 0.2:
                time.sleep(rng.random() / 100)
        victims = rng.sample(mine, 25)
        for _, handle in victims:
            handle.cancel()
        with lock:
            cancelled.extend(victims)
            kept.extend(pair for pair in mine if pair not in victims)

    # Room for about 3 of the 8 sequences that run on a device, so there is preemption.
    with running_engine(devices, slots=8 * devices, pool_tokens=160) as (engine, _):
        in_threads(*[lambda seed=seed: use(engine, seed) for seed in range(8)])
        assert (len(kept), len(cancelled)) == (300, 200)
        for request, handle in kept:
            result = handle.result(30)
            assert result.token_ids == expected_tokens(
                request.prompt, request.sampling.max_new_tokens
            )
        for request, handle in cancelled:
            result = handle.result(30)
            answer = expected_tokens(request.prompt, request.sampling.max_new_tokens)
            assert answer[: len(result.token_ids)] == result.token_ids
            assert result.finish_reason in ("cancelled", "length", "stop")
        assert_is_empty(engine)
        assert engine.stats()["preemptions"] > 10
        assert sum(h.result().finish_reason == "cancelled" for _, h in cancelled) > 10


def test_pieces_of_preempted_answers_join_to_their_text():
    with running_engine(slots=8, pool_tokens=128) as (engine, _):
        handles = {prompt: engine.submit(ask(prompt, 60)) for prompt in PROMPTS}
        texts = {}

        def read(prompt):
            texts[prompt] = "".join(handles[prompt])

        in_threads(*[lambda prompt=prompt: read(prompt) for prompt in PROMPTS])
        for prompt, handle in handles.items():
            assert handle.result().token_ids == expected_tokens(prompt, 60)
            assert texts[prompt] == handle.result().text
        assert engine.stats()["preemptions"] > 2


def test_a_slow_image_delays_nobody_else():
    may_go_on = threading.Event()

    def slow(request):
        may_go_on.wait()
        return prepare(request)

    with running_engine(workers=2) as (engine, _):
        late = engine.submit(ask("slow"), slow)
        for prompt in PROMPTS:
            assert engine.submit(ask(prompt)).result(20).token_ids == expected_tokens(prompt)
        assert not late.is_done
        may_go_on.set()
        assert late.result(20).token_ids == expected_tokens("slow")


def test_what_is_ready_first_goes_first():
    may_go_on, order = threading.Event(), []

    def slow(request):
        may_go_on.wait()
        return prepare(request)

    with running_engine(slots=1, workers=4) as (engine, runner):
        runner.gate.clear()
        handles = [engine.submit(ask(PROMPTS[0]))]
        wait_for(lambda: is_ready(engine, handles[0]))
        handles += [engine.submit(ask("slow"), slow), engine.submit(ask("quick"))]
        for handle in handles:
            handle.add_done_callback(lambda handle: order.append(handle.request.prompt))
        wait_for(lambda: is_ready(engine, handles[2]))
        may_go_on.set()
        wait_for(lambda: is_ready(engine, handles[1]))
        runner.gate.set()
        for handle in handles:
            handle.result(20)
    assert order == [PROMPTS[0], "quick", "slow"]


def test_a_slow_source_delays_no_answer():
    may_go_on = threading.Event()

    def source():
        yield from map(ask, PROMPTS[:2])
        may_go_on.wait()
        yield ask(PROMPTS[2])

    with running_engine() as (engine, _):
        answers = stream_results(engine, source())
        first = dict([next(answers), next(answers)])
        assert {n: r.token_ids for n, r in first.items()} == {
            n: expected_tokens(PROMPTS[n]) for n in range(2)
        }
        may_go_on.set()
        assert [number for number, _ in answers] == [2]


def test_requests_are_taken_as_they_are_needed():
    taken = []

    def endless():
        for number in range(10**9):
            taken.append(number)
            yield ask(f"Number {number}")

    with running_engine(slots=2) as (engine, _):
        answers = stream_results(engine, endless())
        assert len([next(answers) for _ in range(5)]) == 5
        answers.close()
        count = len(taken)
        assert count < 5 + 3 * 2 + 2
        wait_for(lambda: engine.stats()["running"] == engine.stats()["waiting"] == 0)
        assert len(taken) <= count + 1


def test_an_error_of_the_source_is_raised_and_the_engine_is_free():
    def broken():
        yield ask(talkative(100), 100)
        raise ZeroDivisionError

    with running_engine() as (engine, _):
        with pytest.raises(ZeroDivisionError):
            list(stream_results(engine, broken()))
        wait_for(lambda: engine.stats()["blocks_used"] == 0)
        assert engine.submit(ask("next")).result(20).token_ids == expected_tokens("next")


@contextlib.contextmanager
def ending(event):
    """Sets it at the end, so that no thread waits for it for ever."""
    try:
        yield
    finally:
        event.set()


def test_closing_ends_everything_and_refuses_more():
    may_end = threading.Event()
    with running_engine(slots=1, workers=1) as (engine, runner), ending(may_end):
        runner.gate.clear()
        running = engine.submit(ask(talkative(100), 100))
        wait_for(lambda: engine.stats()["waiting"] == 0)
        waiting = engine.submit(ask(PROMPTS[1]))
        preparing = engine.submit(ask("slow"), lambda request: may_end.wait())
        unprepared = engine.submit(ask("later"))
        threading.Timer(0.1, runner.gate.set).start()
        engine.close()
        for handle in (running, waiting, preparing, unprepared):
            assert handle.result(0).finish_reason == "cancelled"
        with raises("the engine is closed"):
            engine.submit(ask("more"))
        with raises("the engine is closed"):
            engine.warm()
        engine.close()
        assert_is_empty(engine)


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="not on this system")
def test_an_idle_engine_takes_no_time_of_a_processor():
    with running_engine() as (engine, _):
        engine.submit(ask("hello")).result(20)
        time.sleep(0.1)  # the step that was dispatched ahead
        clock = time.pthread_getcpuclockid(engine._core._thread.ident)
        before = time.clock_gettime(clock)
        time.sleep(0.5)
        assert time.clock_gettime(clock) - before < 0.005


def test_an_engine_that_nobody_refers_to_ends_with_its_thread():
    engine, runner = make_engine()
    thread, runner = engine._core._thread, weakref.ref(runner)
    handle = engine.submit(ask(talkative(60), 60))
    del engine  # the request under way keeps it
    assert handle.result(20).token_ids == expected_tokens(talkative(60), 60)
    thread.join(20)  # and a handle of one that has ended does not
    assert not thread.is_alive()
    gc.collect()
    assert runner() is None


def test_one_failing_callback_or_decoder_ends_nobody_else():
    class Picky(Tokenizer):
        def decode(self, ids):
            if bad.token_ids and bad.token_ids[-1] in ids:
                raise ValueError("no such letter")
            return super().decode(ids)

    class bad:
        token_ids = ()

    with running_engine(tokenizer=Picky()) as (engine, _):
        handle = engine.submit(ask("hello"))
        handle.add_done_callback(lambda handle: 1 / 0)
        assert handle.result(20).token_ids == expected_tokens("hello")
        bad.token_ids = expected_tokens("other")[:1]
        result = engine.submit(ask("other")).result(20)
        assert result.finish_reason == "error"
        assert "no such letter" in result.error
        bad.token_ids = ()
        assert engine.submit(ask("next")).result(20).token_ids == expected_tokens("next")
        assert_is_empty(engine)
