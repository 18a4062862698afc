"""Every request that has not ended, and the result with which it ends."""

import dataclasses
import threading

from neo_jax.errors import InputError
from neo_jax.infer.handle import RequestHandle
from neo_jax.infer.prepare import Prepared
from neo_jax.infer.request import Result
from neo_jax.infer.sampling import Answer
from neo_jax.infer.sequence import Sequence

CLOSED = "the engine is closed: make another with neo.engine(...)"


@dataclasses.dataclass(eq=False)
class Entry:
    """A request that the scheduler knows."""

    handle: RequestHandle
    prepared: Prepared
    answer: Answer
    sequence: Sequence

    def result(self, reason: str, error: str | None = None) -> Result:
        """The answer as far as it has come."""
        usage = {
            "prompt_tokens": len(self.prepared.prefix_ids),
            "cached_tokens": self.sequence.num_cached_tokens,
            "completion_tokens": len(self.answer.token_ids),
        }
        text, token_ids = self.answer.text.strip(), tuple(self.answer.token_ids)
        return Result(text, token_ids, reason, usage, error)


class OpenRequests:
    """Handles, safe for all threads; and the entries of the engine's thread."""

    def __init__(self):
        self._changed = threading.Condition()
        self._handles: set[RequestHandle] = set()
        self._refusal: str | None = None
        self._by_handle: dict[RequestHandle, Entry] = {}
        self._by_sequence: dict[Sequence, Entry] = {}

    @property
    def is_closed(self) -> bool:
        return self._refusal is not None

    def check(self) -> None:
        """Raises InputError when no more requests are taken."""
        with self._changed:
            if self._refusal:
                raise InputError(self._refusal)

    def open(self, handle: RequestHandle) -> None:
        """Raises InputError when no more requests are taken."""
        with self._changed:
            self.check()
            self._handles.add(handle)

    def refuse(self, why: str = CLOSED) -> list[RequestHandle]:
        """No more are taken; returns those that are open."""
        with self._changed:
            self._refusal = self._refusal or why
            return list(self._handles)

    def wait_until_none(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._handles)

    # For the engine's thread.

    def enter(self, entry: Entry) -> None:
        self._by_handle[entry.handle] = self._by_sequence[entry.sequence] = entry

    def find(self, key: RequestHandle | Sequence) -> Entry | None:
        """None: the scheduler does not know it yet, or it has ended."""
        return self._by_handle.get(key) or self._by_sequence.get(key)

    def finish(self, handle: RequestHandle, reason: str, error: str | None = None) -> None:
        """Ends a request with what it has."""
        if entry := self._by_handle.pop(handle, None):
            del self._by_sequence[entry.sequence]
            handle.finish(entry.result(reason, error))
        else:
            usage = {"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0}
            handle.finish(Result("", (), reason, usage, error))
        with self._changed:
            self._handles.discard(handle)
            self._changed.notify_all()
