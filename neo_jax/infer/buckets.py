"""The few shapes that programs are compiled for, known before the first request.

A prefill has R rows of one block each, per device of the batch axes:

    fresh       all chunks begin their sequences; R is 1, 2, 3, 4, 6, 8, 12, 16, ...
    continued   keys come from C blocks of the pool; R and C are powers of 4, so that there are few

The last of each is what the largest chunk needs. So the number and size of images and the length of
prompts compile nothing new. Each row has room for 4 patches per token, which always suffices: a
visual token is 4 patches, and embedding an unused patch costs next to nothing.
"""

import collections
import dataclasses
from collections.abc import Sequence

from neo_jax.infer.prefill_rows import RowLimits
from neo_jax.infer.sequence import Prefill


@dataclasses.dataclass(frozen=True, order=True)
class PrefillBucket:
    """The shape of one `programs.prefill`, per device of the batch axes."""

    rows: int
    context_blocks: int = 0  # 0: fresh


@dataclasses.dataclass(frozen=True)
class Shapes:
    """All shapes of an engine's prefills, ascending; a larger chunk gets a power of 2."""

    fresh: tuple[int, ...]
    continued: tuple[int, ...]
    context: tuple[int, ...]

    @classmethod
    def of(cls, limits: RowLimits, max_blocks: int, max_image_tokens: int) -> "Shapes":
        """`max_blocks`: of one sequence; `max_image_tokens`: of the largest image."""
        rows = min(limits.max_rows(max_image_tokens), max(limits.rows, max_blocks))
        context = max(limits.context_blocks, max_blocks)
        halves = {n for power in range(16) for n in (1 << power, 3 << power)}
        return cls(
            _up_to(rows, halves), _up_to(rows, _POWERS_OF_4), _up_to(context, _POWERS_OF_4 - {1})
        )

    def all(self) -> list[PrefillBucket]:
        return [
            *(PrefillBucket(rows) for rows in self.fresh),
            *(PrefillBucket(r, c) for r in self.continued for c in self.context if c >= r),
        ]

    def bucket_for(self, chunks: Sequence[Prefill], block_size: int) -> PrefillBucket:
        """The smallest shape for these chunks, which are all fresh or all continued."""
        rows, blocks = _needed(chunks, block_size)
        if _is_fresh(chunks):
            return PrefillBucket(_smallest(self.fresh, rows))
        rows, blocks = _smallest(self.continued, rows), _smallest(self.context, blocks)
        return PrefillBucket(rows, max(blocks, _smallest(self.context, rows)))


_POWERS_OF_4 = frozenset(4**power for power in range(9))


def padded_length(length: int) -> int:
    """The smallest of 128, 256, 512, ... that holds `length` tokens."""
    return max(128, 1 << (length - 1).bit_length())


def _is_fresh(chunks: Sequence[Prefill]) -> bool:
    return all(one.start == 0 for one in chunks)


def _needed(chunks: Sequence[Prefill], block_size: int) -> tuple[int, int]:
    """Rows and key blocks of the device that has most of them."""
    rows, blocks = collections.Counter(), collections.Counter()
    for one in chunks:
        last = -(-one.stop // block_size)
        rows[one.sequence.device] += last - one.start // block_size
        blocks[one.sequence.device] += last
    return max(rows.values()), max(blocks.values())


def _up_to(most: int, sizes) -> tuple[int, ...]:
    return (*sorted(size for size in sizes if size < most), most)


def _smallest(sizes: Sequence[int], needed: int) -> int:
    return next((size for size in sizes if size >= needed), 1 << (needed - 1).bit_length())
