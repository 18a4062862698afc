"""The queue of requests that are prepared: its order, and the memory that it may hold."""

import threading

import numpy as np
import pytest

from helpers.model_engine import wait_for
from neo_jax import Request
from neo_jax.data.example import Example
from neo_jax.infer import intake
from neo_jax.infer.handle import RequestHandle
from neo_jax.infer.intake import Intake
from neo_jax.infer.prepare import Prepared, PreparedImage, _Once
from neo_jax.infer.request import Result


def prepared(size):
    nothing = np.zeros(0, np.int32)
    return Prepared(Example(nothing, nothing, nothing, np.zeros(size, np.uint8), nothing), nothing)


def new_handle(prompt="?"):
    return RequestHandle(Request(prompt), lambda handle: None)


def drained(queue, wanted):
    """The next `wanted` that are ready."""
    found = []
    wait_for(lambda: found.extend(queue.take()) or len(found) >= wanted)
    return found


@pytest.fixture
def queue(monkeypatch):
    """Prompts of 10 bytes, of which 30 may be held; two threads."""
    monkeypatch.setattr(intake, "MAX_BYTES", 30)
    queue = Intake(lambda request: prepared(10), 2, lambda: None)
    yield queue
    queue.close()


def test_no_request_is_begun_while_too_much_is_held(queue):
    handles = [new_handle() for _ in range(20)]
    for handle in handles:
        queue.put(handle)
    held = [handle for handle, _ in drained(queue, 3)]
    seen = len(held)
    while held:
        assert seen - len(held) <= 20
        wait_for(lambda: not queue._busy)
        more = [handle for handle, _ in queue.take()]
        held, seen = held + more, seen + len(more)
        # The bound, and what two threads worked on when it was reached.
        assert 10 * len(held) <= 30 + 10
        queue.release(held.pop(0))
    assert seen == 20
    assert queue.size == 0


def test_a_prompt_larger_than_all_memory_goes_alone(queue):
    queue.put(new_handle(), lambda request: prepared(1000))
    ((first, _),) = drained(queue, 1)
    queue.put(new_handle())
    assert queue.take() == []
    assert queue.size == 1
    queue.release(first)
    assert len(drained(queue, 1)) == 1


def test_what_cannot_be_prepared_holds_nothing(queue):
    def fail(request):
        raise OSError("no such file")

    handle = new_handle()
    queue.put(handle, fail)
    ((found, future),) = drained(queue, 1)
    assert found is handle
    with pytest.raises(OSError, match="no such file"):
        future.result()
    assert queue.size == 0


def test_what_was_cancelled_is_not_prepared(queue):
    may_go_on, begun = threading.Event(), []

    def slow(request):
        begun.append(request.prompt)
        may_go_on.wait()
        return prepared(10)

    handles = [new_handle(str(number)) for number in range(4)]
    for handle in handles:
        queue.put(handle, slow)
    wait_for(lambda: len(begun) == 2)
    handles[2].finish(Result("", (), "cancelled", {}))
    may_go_on.set()
    assert {handle for handle, _ in drained(queue, 3)} == {handles[0], handles[1], handles[3]}
    assert sorted(begun) == ["0", "1", "3"]


def test_pictures_are_kept_within_a_bound_of_bytes():
    made, once = [], _Once(25)

    def image(key):
        def make():
            made.append(key)
            patches = np.zeros(10 if key != "large" else 100, np.uint8)
            return PreparedImage(patches, np.zeros((1, 2)), 0)

        return once(key, make)

    first = image("a")
    assert image("a") is first
    image("b")
    image("a")  # so that b is the least recently used
    image("c")
    image("a")
    image("b")
    assert made == ["a", "b", "c", "b"]
    for _ in range(2):
        assert len(image("large").patches) == 100
    assert made[4:] == ["large", "large"]
    image("a")
    assert made[6:] == ["a"]


def test_a_picture_that_two_ask_for_is_made_once_and_one_that_fails_again():
    may_go_on, calls, once = threading.Event(), [], _Once(100)

    def make():
        calls.append(1)
        may_go_on.wait()
        if len(calls) == 1:
            raise OSError("broken off")
        return PreparedImage(np.zeros(1, np.uint8), np.zeros((1, 2)), 0)

    errors, threads = [], []

    def ask():
        try:
            once("key", make)
        except OSError as error:
            errors.append(error)

    for _ in range(3):
        threads.append(threading.Thread(target=ask))
        threads[-1].start()
    wait_for(lambda: len(calls) == 1)
    may_go_on.set()
    for thread in threads:
        thread.join(20)
    assert len(errors) >= 1
    once("key", make)
    assert len(calls) == 2
