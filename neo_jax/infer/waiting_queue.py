"""Requests that wait for a slot, prepared by worker threads while the device runs."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from neo_jax.infer.prepare import Prepared
from neo_jax.infer.request import Request


class WaitingQueue:
    """Requests that wait for a slot, prepared in threads, a window of them at a time."""

    def __init__(
        self,
        requests: Iterable[Request],
        prepare: Callable[[Request], Prepared],
        threads: ThreadPoolExecutor,
        size: int,
    ):
        self._requests, self._prepare = enumerate(requests), prepare
        self._threads, self._size, self._ended = threads, size, False
        self._waiting: dict[int, tuple[Request, Future]] = {}

    @property
    def is_empty(self) -> bool:
        self._fill()
        return not self._waiting

    def prepared(self, wait: bool) -> list[tuple[int, Request, Future]]:
        """Those that are prepared, in their order; if `wait`, at least the first."""
        self._fill()
        if wait and self._waiting:
            next(iter(self._waiting.values()))[1].exception()
        return [(i, r, f) for i, (r, f) in self._waiting.items() if f.done()]

    def remove(self, index: int) -> None:
        del self._waiting[index]

    def cancel(self) -> None:
        for _, future in self._waiting.values():
            future.cancel()

    def _fill(self) -> None:
        while not self._ended and len(self._waiting) < self._size:
            index, request = next(self._requests, (None, None))
            if request is None:
                self._ended = True
                return
            self._waiting[index] = request, self._threads.submit(self._prepare, request)
