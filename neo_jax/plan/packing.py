"""Packs synthetic documents as the data pipeline does, and counts the blocks of attention.

How long attention takes depends on how documents fill rows. The mixes below stand for kinds of
data. Their lengths are assumptions, sampled from a fixed seed. A plan names its mix.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np

from neo_jax.errors import InputError

# The lengths of a document's runs of text and of its images, in order.
Document = list[tuple[str, int]]
TEXT, IMAGE = "text", "image"
SEED = 0
OPEN_ROWS = 8  # rows that are filled at once, as data.packing_rows


def _caption(rng: np.random.Generator) -> Document:
    return [(TEXT, _between(rng, 15, 30)), (IMAGE, _between(rng, 64, 1024)),
            (TEXT, _between(rng, 40, 150))]  # fmt: skip


def _sft(rng: np.random.Generator) -> Document:
    image = int(np.exp(rng.uniform(np.log(256), np.log(4096))))
    return [(TEXT, _between(rng, 30, 60)), (IMAGE, image), (TEXT, _between(rng, 60, 800))]


def _multi(rng: np.random.Generator) -> Document:
    document = [(TEXT, 40)]
    for _ in range(_between(rng, 4, 16)):
        document += [(IMAGE, _between(rng, 256, 1024)), (TEXT, _between(rng, 3, 40))]
    return [*document, (TEXT, _between(rng, 60, 400))]


def _video(rng: np.random.Generator) -> Document:
    frames, size = _between(rng, 32, 128), _between(rng, 64, 256)
    return [(TEXT, 40), *[(TEXT, 8), (IMAGE, size)] * frames, (TEXT, 200)]


def _text(rng: np.random.Generator) -> Document:
    return [(TEXT, _between(rng, 200, 4000))]


def _mixed(rng: np.random.Generator) -> Document:
    # text : image : multi-image : video = 2 : 4 : 1 : 1, as the second stage of NEO-ov
    return rng.choice([_text, _sft, _multi, _video], p=[0.25, 0.5, 0.125, 0.125])(rng)


MIXES: dict[str, Callable[[np.random.Generator], Document]] = {
    "caption": _caption,  # an image of 64 to 1024 tokens and a sentence
    "sft": _sft,  # an image of 256 to 4096 tokens and a conversation
    "multi": _multi,  # 4 to 16 images
    "video": _video,  # 32 to 128 frames
    "text": _text,
    "mixed": _mixed,
}
CAUSAL = "causal"  # one text as long as the row: the most work for attention


@dataclasses.dataclass(frozen=True)
class Row:
    """A packed row. Token i attends to the keys [start[i], end[i])."""

    start: np.ndarray  # [L]
    end: np.ndarray  # [L]
    tokens: int  # without padding
    image_tokens: int

    @property
    def keys(self) -> int:
        """The keys that a token attends to, summed over tokens."""
        return int((self.end - self.start)[: self.tokens].sum())


@functools.cache
def sample_rows(mix: str, length: int, count: int) -> tuple[Row, ...]:
    """Packs `count` rows of a mix, best fit. Documents longer than a row are left out.

    Raises:
      InputError: for an unknown mix, or if no document fits into a row.
    """
    if mix == CAUSAL:
        return (build_row([[(TEXT, length)]], length),) * count
    if mix not in MIXES:
        raise InputError(f"packing {mix!r}: use one of {', '.join([*MIXES, CAUSAL])}")
    rows, opened = [], [[] for _ in range(OPEN_ROWS)]
    free = [length] * OPEN_ROWS
    for document in _documents(mix, length):
        size = sum(part for _, part in document)
        fitting = [i for i in range(OPEN_ROWS) if size <= free[i]]
        if not fitting:  # the fullest row is finished
            place = int(np.argmin(free))
            rows.append(build_row(opened[place], length))
            opened[place], free[place] = [document], length - size
            if len(rows) == count:
                return tuple(rows)
        else:
            place = min(fitting, key=lambda i: free[i])
            opened[place].append(document)
            free[place] -= size


def _documents(mix: str, length: int) -> Iterator[Document]:
    rng, refused = np.random.default_rng(SEED), 0
    while refused < 1000:
        document = MIXES[mix](rng)
        if sum(part for _, part in document) <= length:
            refused = 0
            yield document
        refused += 1
    raise InputError(f"packing {mix!r}: no document fits into rows of {length} tokens")


def build_row(documents: list[Document], length: int) -> Row:
    """A row of documents, one after the other, then padding."""
    start = np.arange(length)  # padding attends to itself
    end, place, image_tokens = start + 1, 0, 0
    for document in documents:
        first = place
        for kind, size in document:
            start[place : place + size] = first
            if kind == IMAGE:
                end[place : place + size] = place + size
                image_tokens += size
            place += size
    return Row(start, end, place, image_tokens)


def count_blocks(row: Row, block_q: int, block_k: int) -> tuple[int, int]:
    """Counts the blocks that are not empty, and those that are full (every query sees every key).

    `start` and `end` never fall along a row, so the key blocks of a query block are consecutive:

                   keys
        queries    full     partial  empty
                   partial  full     partial
                   empty    partial  full

    Args:
      row: a packed row.
      block_q, block_k: queries and keys of a block; the last ones may have fewer.

    Returns:
      how many blocks are not empty, and how many of them are full, and so need no mask.
    """
    length = len(row.start)
    first = np.arange(0, length, block_q)
    last = np.minimum(first + block_q, length) - 1
    low, high = row.start[first] // block_k, -(-row.end[last] // block_k)
    # Every query of the block sees the keys [start of its last query, end of its first).
    full_low = -(-row.start[last] // block_k)
    full_high = np.where(row.end[first] == length, high, row.end[first] // block_k)
    # A block that is cut off at the end has fewer queries or keys than the kernel computes with.
    is_cut = (last - first + 1 < block_q) | (length % block_k > 0) & (full_high * block_k > length)
    full = np.where(is_cut, 0, np.maximum(0, full_high - full_low))
    return int((high - low).sum()), int(full.sum())


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high + 1))
