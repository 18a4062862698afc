"""Which slot a request gets, and what of an earlier prompt it finds there."""

import dataclasses
import functools

import numpy as np

from neo_jax.data.example import Example
from neo_jax.infer.prepare import Prepared
from neo_jax.infer.sampling import Answer

# A shorter common prefix is computed again rather than copied.
MIN_PREFIX = 64


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request that has a slot.

    Attributes:
      num_computed_tokens: how many tokens of the prompt are in the slot (or on the way there).
      num_cached_tokens: how many of those were found in the cache.
      num_scheduled_tokens: how many tokens the device was told to generate.
    """

    index: int
    prepared: Prepared
    answer: Answer
    slot: "Slot"
    num_computed_tokens: int
    num_cached_tokens: int
    num_scheduled_tokens: int = 0

    @property
    def length(self) -> int:
        return len(self.prepared.prefix_ids)

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """[L] up to where in its prompt each token sees: past its own image, or itself."""
        t = self.prepared.example.thw[:, 0]
        return np.searchsorted(t, t, side="right")

    @property
    def is_prefilled(self) -> bool:
        return self.num_computed_tokens == self.length

    def next_chunk(self, budget: int) -> tuple[int, int]:
        """The next tokens to put into the slot: at most `budget`, but never a part of a picture."""
        is_image, start = self.prepared.example.is_image, self.num_computed_tokens
        stop = min(start + budget, self.length)
        if stop < self.length and is_image[stop] and is_image[stop - 1]:
            before = _picture_start(is_image, stop)
            stop = before if before > start else _picture_stop(is_image, stop)
        return start, stop

    def part(self, start: int, stop: int) -> Example:
        """Some tokens of the prompt, with their patches."""
        example = self.prepared.example
        first, last = (4 * int(example.is_image[:place].sum()) for place in (start, stop))
        return Example(
            example.tokens[start:stop],
            example.thw[start:stop],
            example.is_image[start:stop],
            example.patches[first:last],
            example.patch_hw[first:last],
        )


@dataclasses.dataclass(eq=False)
class Slot:
    """A row of the cache: the `number`-th on its `device` of the batch axes."""

    device: int
    number: int
    prefix_ids: np.ndarray  # of the tokens whose keys and values it holds
    sequence: Sequence | None = None
    used: int = 0  # when it was last given away


def usable_prefix(prepared: Prepared, prefix_ids: np.ndarray) -> int:
    """How many first tokens of a prompt are those of `prefix_ids`, cut back to whole pictures.

    At least one token is left to compute, and short prefixes count as none.
    """
    length = min(len(prepared.prefix_ids) - 1, len(prefix_ids))
    differs = prepared.prefix_ids[:length] != prefix_ids[:length]
    length = int(np.argmax(differs)) if differs.any() else length
    is_image = prepared.example.is_image
    if length and is_image[length] and is_image[length - 1]:
        length = _picture_start(is_image, length)
    return length if length >= MIN_PREFIX else 0


def choose(prepared: Prepared, slots: list[Slot], reuse: bool) -> tuple[Slot, Slot, int] | None:
    """The free slot for a prompt, the slot that holds its prefix, and how long that is.

    Returns None when no slot is free, or when it pays to wait because a request that is being
    filled right now will hold more of the prefix.
    """
    free = [slot for slot in slots if slot.sequence is None]
    if not free:
        return None
    oldest = min(free, key=lambda slot: (len(slot.prefix_ids) > 0, slot.used))
    if not reuse:
        return oldest, oldest, 0
    best = (oldest, oldest, 0)
    for source in slots:
        length = usable_prefix(prepared, source.prefix_ids)
        # In place if the holder is free, or else copied within the device.
        near = [slot for slot in free if slot.device == source.device]
        target = source if source in free else min(near, key=lambda slot: slot.used, default=None)
        if target is not None and length > best[2]:
            best = (target, source, length)
    prefilling = [
        slot.sequence for slot in slots if slot.sequence and not slot.sequence.is_prefilled
    ]
    if any(usable_prefix(prepared, other.prepared.prefix_ids) > best[2] for other in prefilling):
        return None
    return best


def _picture_start(is_image: np.ndarray, place: int) -> int:
    """Where the picture that `place` is in begins."""
    text = np.flatnonzero(~is_image[:place])
    return int(text[-1]) + 1 if len(text) else 0


def _picture_stop(is_image: np.ndarray, place: int) -> int:
    return place + int(np.argmin(np.append(is_image[place:], False)))
