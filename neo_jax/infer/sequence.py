"""A request as the scheduler sees it, and what it schedules: chunks of prompts and decode steps.

Tokens of a sequence are its prompt and the tokens sampled since. Token i has its key and value in
block `blocks[i // block_size]` of its device's pool, at place `i % block_size`.
"""

import bisect
import dataclasses
import enum
import hashlib
from typing import Any

import numpy as np


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass(eq=False)
class Sequence:
    """One prompt and its answer.

    Attributes:
      number: of its arrival, unique; the smallest goes first.
      prefix_ids: [L] int64, the token, or for a visual token a number made of its whole image and
        its index. Equal prefixes have equal keys and values.
      is_image: [L] bool, visual tokens. Neighbours belong to one image; `images` has the
        (start, stop) of each.
      max_new_tokens: 1 or more.
      request: whatever the engine attaches.
      output_ids: sampled tokens that the host knows.
      num_in_flight: tokens that are being sampled on the device.
      blocks: its block table.
      device: whose pool it uses; -1 while it has none.
      lane: its row of the decode program on this device; -1 while it has none.
      num_computed_tokens: how many first tokens have keys and values (once the device is done).
      num_cached_tokens: how many of those were found in the prefix cache when it first ran.
      num_preemptions: how often its blocks were taken away.
      is_prefilled: its next step is a decode.
    """

    number: int
    prefix_ids: np.ndarray
    is_image: np.ndarray
    max_new_tokens: int
    request: Any = None
    output_ids: list[int] = dataclasses.field(default_factory=list)
    num_in_flight: int = 0
    blocks: list[int] = dataclasses.field(default_factory=list)
    device: int = -1
    lane: int = -1
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    is_prefilled: bool = False
    status: Status = Status.WAITING

    def __post_init__(self):
        self.prompt_length = len(self.prefix_ids)
        self.block_hashes: list[bytes] = []  # of the full blocks of known tokens
        self.num_registered = 0  # of its blocks, those that were offered to the prefix cache
        self.parked_at: bytes | None = None  # the hash of a block that it waits for
        edges = np.flatnonzero(np.diff(self.is_image, prepend=False, append=False)).tolist()
        self.images = list(zip(edges[::2], edges[1::2], strict=True))

    @property
    def num_tokens(self) -> int:
        """Of the prompt and of the answer, as far as the host knows it."""
        return self.prompt_length + len(self.output_ids)

    def forget_place(self) -> None:
        """It has no lane and no blocks any more, so nothing of it is computed."""
        self.blocks, self.device, self.lane = [], -1, -1
        self.num_computed_tokens = self.num_registered = 0
        self.is_prefilled = False

    def image_at(self, place: int) -> tuple[int, int] | None:
        """Start and stop of the image that would be cut in two before token `place`."""
        index = bisect.bisect_left(self.images, (place,)) - 1
        is_cut = index >= 0 and place < self.images[index][1]
        return self.images[index] if is_cut else None

    def hash_blocks(self, block_size: int) -> None:
        """Extends `block_hashes` to all full blocks of known tokens."""
        for index in range(len(self.block_hashes), self.num_tokens // block_size):
            start, stop = index * block_size, (index + 1) * block_size
            ids = np.asarray(self.prefix_ids[start:stop], np.int64).tobytes()
            if stop > self.prompt_length:
                outputs = self.output_ids[max(0, start - self.prompt_length) :]
                outputs = outputs[: stop - max(start, self.prompt_length)]
                ids += np.array(outputs, np.int64).tobytes()
            before = self.block_hashes[-1] if index else b""
            self.block_hashes.append(hashlib.blake2b(before + ids, digest_size=16).digest())


@dataclasses.dataclass(frozen=True)
class Prefill:
    """A chunk: tokens [start, stop) of a sequence are computed."""

    sequence: Sequence
    start: int
    stop: int
    samples: bool  # the chunk ends the sequence's tokens, so the next one is sampled


@dataclasses.dataclass(frozen=True)
class Step:
    """What the device does next. False if that is nothing.

    Attributes:
      prefills: chunks of different sequences.
      decodes: sequences that get one more token: the token at `num_computed_tokens` is fed.
    """

    prefills: list[Prefill] = dataclasses.field(default_factory=list)
    decodes: list[Sequence] = dataclasses.field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.prefills or self.decodes)


def num_rows(start: int, stop: int, block_size: int) -> int:
    """How many rows of a prefill the tokens [start, stop) take: as many as blocks they touch."""
    return (stop - 1) // block_size - start // block_size + 1


def chunk_stop(sequence: Sequence, start: int, rows: int, block_size: int) -> int:
    """Where a chunk of about so many rows ends: at the edge of a block, never inside an image.

    ```
    text text [image image image image] text         | the rows end here
                              |                        the image starts in the second half: stop
    ------------------------->                         before it
    text [image image image image image] text        the image starts in the first half: it is
                              |                        taken whole, with what fills its last row
    --------------------------------------->
    ```
    """
    stop = (start // block_size + rows) * block_size
    if stop >= sequence.num_tokens:
        return sequence.num_tokens
    image = sequence.image_at(stop)
    if image is None:
        return stop
    if image[0] - start >= rows * block_size / 2:
        return image[0]
    edge = min(-(-image[1] // block_size) * block_size, sequence.num_tokens)
    return edge if sequence.image_at(edge) is None else image[1]
