"""Waiting sequences by their number, those apart that wait for a prefix that others compute."""

import bisect
import operator

from neo_jax.infer.sequence import Sequence

NUMBER = operator.attrgetter("number")


class SequenceQueue:
    """Indexed by place in the queue; parked sequences have none, but count in `num_waiting`."""

    def __init__(self):
        self._queue: list[Sequence] = []
        self._parked: dict[bytes, list[Sequence]] = {}  # by the hash of the block they wait for

    def __len__(self) -> int:
        return len(self._queue)

    def __getitem__(self, place: int) -> Sequence:
        return self._queue[place]

    @property
    def num_waiting(self) -> int:
        return len(self._queue) + sum(map(len, self._parked.values()))

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self._queue, sequence, key=NUMBER)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, parked or not."""
        if sequence.parked_at is None:
            del self._queue[bisect.bisect_left(self._queue, sequence.number, key=NUMBER)]
            return
        parked = self._parked[sequence.parked_at]
        parked.remove(sequence)
        if not parked:
            del self._parked[sequence.parked_at]
        sequence.parked_at = None

    def park(self, sequence: Sequence, block_hash: bytes) -> None:
        """Sets a sequence aside until `wake` is called with this hash."""
        self.remove(sequence)
        self._parked.setdefault(block_hash, []).append(sequence)
        sequence.parked_at = block_hash

    def wake(self, hashes: list[bytes]) -> None:
        """These blocks are computed, or nobody is going to compute them."""
        for block_hash in hashes if self._parked else ():
            for sequence in self._parked.pop(block_hash, ()):
                sequence.parked_at = None
                self.add(sequence)

    def wake_all(self) -> None:
        self.wake(list(self._parked))
