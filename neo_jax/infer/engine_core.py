"""The engine's thread: it alone drives scheduler and runner.

    repeat   make the calls that other threads have put into the inbox
             schedule a step ──▶ dispatch its programs ──▶ read the tokens of the step before

So the device has its next step before it has ended this one, and reading tokens never makes it
wait. When there is nothing to do, the thread sleeps until a call comes.

A program that fails takes the state of the device with it. Its own requests fail; the others are
computed again, from their prompts and the tokens that they have.
"""

import atexit
import collections
import contextlib
import dataclasses
import logging
import queue
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from collections.abc import Sequence as List
from concurrent.futures import Future

import jax
from jax.sharding import Mesh

from neo_jax.data.tokenizer import NeoTokenizer
from neo_jax.errors import InputError
from neo_jax.infer.handle import RequestHandle
from neo_jax.infer.intake import Intake, Prepare
from neo_jax.infer.open_requests import Entry, OpenRequests
from neo_jax.infer.prefill_arrays import PromptArrays
from neo_jax.infer.prepare import Prepared
from neo_jax.infer.runner import InFlight, ProgramError, Runner
from neo_jax.infer.sampling import Answer
from neo_jax.infer.scheduler import Scheduler
from neo_jax.infer.sequence import Sequence

_LOG = logging.getLogger(__name__)


class EngineCore:
    """Answers the requests that are put into it.

    Args:
      prepare, workers: of `Intake`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        mesh: Mesh,
        tokenizer: NeoTokenizer,
        prepare: Prepare,
        workers: int | None,
    ):
        self._scheduler, self._runner = scheduler, runner
        self._mesh, self._tokenizer = mesh, tokenizer
        # Takes no lock, so a finalizer may put a call into it, whatever that interrupts.
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._intake = Intake(prepare, workers, lambda: self._inbox.put(self._admit))
        self._in_flight: collections.deque[InFlight] = collections.deque()
        self._num_requests = self._num_generated = 0
        self._is_stopped = False
        self.requests = OpenRequests()
        self._stats = scheduler.stats()
        self._thread = threading.Thread(target=self._drive, name="neo-engine", daemon=True)
        self._thread.start()
        _CORES.add(self)

    # For all threads.

    def submit(self, handle: RequestHandle, prepare: Prepare | None) -> None:
        """Raises InputError when the engine is closed."""
        self.requests.open(handle)
        self._intake.put(handle, prepare)

    def cancel(self, handle: RequestHandle) -> None:
        self._inbox.put(lambda: self._end_cancelled(handle))

    def warm(self) -> int:
        """Compiles every planned program, between two steps; returns how many.

        Raises:
          InputError: when the engine is closed.
          RuntimeError: when a program cannot be compiled or run.
        """
        self.requests.check()
        count: Future[int] = Future()
        self._inbox.put(lambda: self._warm(count))
        while not count.done():  # a call that came after the thread's end is never made
            with contextlib.suppress(TimeoutError):
                return count.result(timeout=1)
            if not self._thread.is_alive() and not count.done():
                self.requests.check()
        return count.result()

    def stats(self) -> dict[str, int]:
        """As it was after the latest step, or the latest request that ended."""
        counts = dataclasses.asdict(self._stats)
        counts["waiting"] += self._intake.size
        return counts | {"generated_tokens": self._num_generated}

    def stop(self) -> None:
        """Soon the thread ends. Takes no lock, so a finalizer may call it."""
        self._is_stopped = True
        self._inbox.put(lambda: None)  # wakes the thread

    def close(self) -> None:
        """Cancels what is under way and frees the memory."""
        self.requests.refuse()
        self.stop()
        self.join()

    def join(self, timeout: float | None = None) -> None:
        """Waits for the thread's end."""
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    # The engine's thread.

    def _drive(self) -> None:
        failure = None
        try:
            with jax.set_mesh(self._mesh):
                is_idle = False
                while not self._is_stopped:
                    self._make_calls(wait=is_idle)
                    is_idle = not (self._is_stopped or self._step())
                    self._stats = self._scheduler.stats()
        except BaseException as error:  # nobody may wait for a thread that has ended
            _LOG.error("the engine stops\n%s", traceback.format_exc())
            failure = f"the engine has stopped, make another with neo.engine(...): {_text(error)}"
        self._end_all(failure)

    def _make_calls(self, wait: bool) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._inbox.get(block=wait)()
                wait = False

    def _step(self) -> bool:
        """Dispatches one step and reads the step before; False if there was neither."""
        step, before = self._scheduler.schedule(), len(self._in_flight)
        if not step and not before:
            return False
        failed = None
        try:
            self._in_flight.extend(self._runner.execute(step))
            self._scheduler.commit(step)
            for _ in range(before):
                self._take_tokens(self._in_flight[0])
                self._in_flight.popleft()
        except ProgramError as error:
            if self._is_stopped:  # the interpreter may be ending, and JAX with it
                return False
            # Text, because a log that keeps the error would keep the old state alive.
            _LOG.error("a device program failed\n%s", traceback.format_exc())
            failed = error.sequences, f"a device program failed: {error}"
        if failed:  # now that the error is gone, whose frames hold what is left of the state
            self._recover(*failed)
        return True

    def _recover(self, culprits: List[Sequence] = (), why: str = "") -> None:
        """After a failed program: its sequences end, the others wait to be computed again."""
        self._in_flight.clear()
        stopped = self._scheduler.reset()
        for sequence in culprits:
            self._scheduler.cancel(sequence)  # if it was preempted meanwhile
            if entry := self.requests.find(sequence):
                self._finish(entry.handle, "error", why)
        self._runner.rebuild()
        for sequence in stopped:
            if self.requests.find(sequence):
                self._scheduler.add(sequence)

    def _warm(self, count: Future) -> None:
        if self._is_stopped:
            return
        failure = None
        try:
            number = self._runner.warm()
        except Exception as error:
            failure = RuntimeError(f"a program cannot be compiled or run: {_text(error)}")
        if failure is None:
            count.set_result(number)
            return
        try:
            self._recover()
        finally:
            count.set_exception(failure)

    def _admit(self) -> None:
        """Hands prepared requests to the scheduler; those that cannot be answered end here."""
        for handle, prepared in self._intake.take():
            if handle.is_done:
                self._intake.release(handle)
                continue
            try:
                entry = self._make_entry(handle, prepared)
            except Exception as error:  # one bad request must not end the others
                self._finish(handle, "error", _text(error))
                continue
            self.requests.enter(entry)
            self._scheduler.add(entry.sequence)

    def _make_entry(self, handle: RequestHandle, prepared: Future) -> Entry:
        ready: Prepared = prepared.result()
        settings = handle.request.sampling
        self._scheduler.check(len(ready.prefix_ids), settings.max_new_tokens)
        answer = Answer(settings, self._tokenizer.decode, [self._tokenizer.turn_end_id])
        self._num_requests += 1
        sequence = Sequence(
            self._num_requests, ready.prefix_ids, ready.example.is_image, settings.max_new_tokens,
            PromptArrays(ready.example, settings),
        )  # fmt: skip
        return Entry(handle, ready, answer, sequence)

    def _take_tokens(self, landed: InFlight) -> None:
        tokens, now = landed.read(), time.perf_counter()
        for token, sequence in tokens:
            entry = self.requests.find(sequence)
            if entry is None:  # it had ended before this token was known
                self._scheduler.append(sequence, token, is_finished=True)
                continue
            error = None
            try:
                reason = entry.answer.add(token)
            except Exception as failure:  # of the tokenizer: it must not end the others
                reason, error = "error", _text(failure)
            self._num_generated += 1
            entry.handle.token_times.append(now)
            self._scheduler.append(sequence, token, is_finished=reason is not None)
            if reason:
                self._finish(entry.handle, reason, error)
            else:
                entry.handle.update(entry.answer.text)

    def _end_cancelled(self, handle: RequestHandle) -> None:
        if not handle.is_done:
            if entry := self.requests.find(handle):
                self._scheduler.cancel(entry.sequence)
            self._finish(handle, "cancelled")

    def _finish(self, handle: RequestHandle, reason: str, error: str | None = None) -> None:
        self._intake.release(handle)
        self._stats = self._scheduler.stats()  # who has a result sees its blocks free
        self.requests.finish(handle, reason, error)

    def _end_all(self, failure: str | None) -> None:
        """Ends what is under way, by the failure or because the engine is closed."""
        self._is_stopped = True
        handles = self.requests.refuse(failure) if failure else self.requests.refuse()
        self._intake.close()
        self._in_flight.clear()
        entries = [entry for handle in handles if (entry := self.requests.find(handle))]
        with contextlib.suppress(Exception):  # where it is the scheduler that has failed
            self._scheduler.reset()
            for entry in entries:
                self._scheduler.cancel(entry.sequence)
        self._runner.free()
        for handle in handles:
            self._finish(handle, "error" if failure else "cancelled", failure)
        self._stats = self._scheduler.stats()
        with contextlib.suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()


def _text(error: BaseException) -> str:
    return str(error) if isinstance(error, InputError) else repr(error)


_CORES: weakref.WeakSet[EngineCore] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """Before JAX ends: a thread in the middle of a program would crash the interpreter."""
    for core in list(_CORES):
        core.stop()
    for core in list(_CORES):
        core.join(timeout=30)
