"""Requests on their way to the scheduler: prepared by threads, within a bound of memory."""

import collections
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from neo_jax.infer.handle import RequestHandle
from neo_jax.infer.prepare import Prepared
from neo_jax.infer.request import Request

MAX_BYTES = 1 << 30  # of prepared prompts that have not ended
MAX_WORKERS = 32

Prepare = Callable[[Request], Prepared]


class Intake:
    """A queue whose requests are prepared in their order, but leave it as they are ready.

    A slow image delays nobody else. No request is begun while prepared ones hold MAX_BYTES or
    more; so the bound is passed by what the threads work on at that moment, and no more.

    Args:
      prepare: turns a request into a prompt; runs in the threads.
      workers: threads; default: the processors of this machine.
      on_ready: called from a thread when a prompt is ready.
    """

    def __init__(self, prepare: Prepare, workers: int | None, on_ready: Callable[[], None]):
        self._prepare, self._on_ready = prepare, on_ready
        self._workers = workers or min(MAX_WORKERS, os.cpu_count() or 4)
        self._threads = ThreadPoolExecutor(self._workers, thread_name_prefix="neo-prepare")
        self._lock = threading.Lock()
        self._waiting: collections.deque[tuple[RequestHandle, Prepare]] = collections.deque()
        self._ready: collections.deque[tuple[RequestHandle, Future]] = collections.deque()
        self._held: dict[RequestHandle, int] = {}  # bytes of each prompt that has not ended
        self._busy, self._is_closed = 0, False

    @property
    def size(self) -> int:
        """Requests that the scheduler has not seen."""
        with self._lock:
            busy = 0 if self._is_closed else self._busy
            return len(self._waiting) + busy + len(self._ready)

    def put(self, handle: RequestHandle, prepare: Prepare | None = None) -> None:
        with self._lock:
            self._waiting.append((handle, prepare or self._prepare))
        self._begin()

    def take(self) -> list[tuple[RequestHandle, Future]]:
        """Those that are ready, with their prompts or errors."""
        with self._lock:
            ready, self._ready = list(self._ready), collections.deque()
        return ready

    def release(self, handle: RequestHandle) -> None:
        """A request has ended: its memory is free for the next."""
        with self._lock:
            self._held.pop(handle, None)
        self._begin()

    def close(self) -> None:
        """Begins no more; what is under way is dropped when it is ready."""
        with self._lock:
            self._is_closed = True
            self._waiting.clear()
            self._ready.clear()
        self._threads.shutdown(wait=False)

    def _begin(self) -> None:
        with self._lock:
            while (
                self._waiting
                and not self._is_closed
                and self._busy < self._workers
                and (sum(self._held.values()) < MAX_BYTES or not self._busy + len(self._held))
            ):
                handle, prepare = self._waiting.popleft()
                if handle.is_done:  # cancelled before its turn
                    continue
                self._busy += 1
                self._threads.submit(self._run, handle, prepare)

    def _run(self, handle: RequestHandle, prepare: Prepare) -> None:
        future: Future = Future()
        try:
            prepared = prepare(handle.request)
            future.set_result(prepared)
            size = prepared.example.patches.nbytes
        except BaseException as error:
            future.set_exception(error)
            size = 0
        with self._lock:
            self._busy -= 1
            if not self._is_closed:
                self._held[handle] = size
                self._ready.append((handle, future))
        self._begin()
        self._on_ready()
