"""A submitted request: its text as it comes, its result, and the way to cancel it.

Any thread may hold a handle. The engine's thread writes to it; whoever waits is woken.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from neo_jax.errors import InputError
from neo_jax.infer.request import Request, Result

_LOG = logging.getLogger(__name__)


class RequestHandle:
    """What `Engine.submit` returns.

    Iterating gives pieces of text, whose join is the result's text; `async for` does so too.

    Attributes:
      token_times: when each token of the answer was known, by `time.perf_counter`.
    """

    def __init__(self, request: Request, on_cancel: Callable[["RequestHandle"], None]):
        self.request = request
        self._on_cancel: Callable[[RequestHandle], None] | None = on_cancel
        self.token_times: list[float] = []
        self._text, self._result = "", None
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []
        self._on_done: list[Callable[[RequestHandle], None]] = []

    @property
    def is_done(self) -> bool:
        return self._result is not None

    def result(self, timeout: float | None = None) -> Result:
        """Waits for the answer.

        Args:
          timeout: seconds; None waits for ever.

        Raises:
          TimeoutError: the request goes on.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._result is not None, timeout):
                raise TimeoutError(f"no result within {timeout} seconds")
            return self._result

    def cancel(self) -> None:
        """Ends the request; its blocks are free at the engine's next step.

        The result then has what was answered so far and the finish reason "cancelled".
        """
        if on_cancel := self._on_cancel:
            on_cancel(self)

    def add_done_callback(self, callback: Callable[["RequestHandle"], None]) -> None:
        """Calls `callback(handle)` when the result is there, from the engine's thread, or now.

        It must be brief: the engine waits for it.
        """
        with self._changed:
            if self._result is None:
                self._on_done.append(callback)
                return
        callback(self)

    def __iter__(self) -> Iterator[str]:
        """Pieces of text as they come.

        Raises:
          InputError: for a request that failed.
        """
        sent = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._has_news(sent))  # noqa: B023
                text, result = self._text, self._result
            yield from self._pieces(text, sent, result)
            sent = max(sent, len(text))
            if result is not None:
                return

    async def __aiter__(self) -> AsyncIterator[str]:
        sent, loop, news = 0, asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            _wake(loop, news)

        with self._changed:
            self._listeners.append(wake)
        try:
            while True:
                news.clear()
                with self._changed:
                    text, result = self._text, self._result
                for piece in self._pieces(text, sent, result):
                    yield piece
                sent = max(sent, len(text))
                if result is not None:
                    return
                await news.wait()
        finally:
            with self._changed:
                self._listeners.remove(wake)

    async def aresult(self) -> Result:
        """As `result`, for asyncio."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        self.add_done_callback(lambda _: _wake(loop, done))
        await done.wait()
        return self.result()

    def _has_news(self, sent: int) -> bool:
        return self._result is not None or len(self._text) > sent

    def _pieces(self, text: str, sent: int, result: Result | None) -> Iterator[str]:
        if result is not None and result.error is not None:
            raise InputError(result.error)
        if len(text) > sent:
            yield text[sent:]

    # What follows is the engine's.

    def update(self, text: str) -> None:
        """The answer so far; only what of it is certain is shown."""
        shown = certain_text(text, self.request.sampling.stop)
        with self._changed:
            if len(shown) > len(self._text):
                self._text = shown
                self._notify()

    def finish(self, result: Result) -> None:
        """The answer; what comes after the first is ignored."""
        with self._changed:
            if self._result is not None:
                return
            self._text, self._result = result.text, result
            self._on_cancel = None  # so that a handle which is kept keeps no engine
            self._notify()
            callbacks, self._on_done = self._on_done, []
        for callback in callbacks:
            try:
                callback(self)
            except Exception:  # of the caller's: the engine's thread goes on
                _LOG.exception("a callback of a request failed")

    def _notify(self) -> None:
        self._changed.notify_all()
        for listener in self._listeners:
            listener()


def _wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits there any more
        loop.call_soon_threadsafe(event.set)


def certain_text(text: str, stops: Sequence[str]) -> str:
    """The part of an answer so far that will stay: no end that may be cut off or stripped."""
    for stop in stops:
        held = (size for size in range(len(stop), 0, -1) if text.endswith(stop[:size]))
        text = text[: len(text) - next(held, 0)]
    return text.strip()
