"""The few shapes that programs are compiled for, known before the first request.

A chunk of a prompt is padded to 128, 256, 512, ... tokens, as far as the prefill budget goes. One
row is extended alone, or as many together as the budget and the slots allow. A picture is never
cut, so larger chunks are there for larger pictures. Every chunk has room for 4 patches per token,
which always suffices because a visual token is 4 patches, and embedding an unused patch costs next
to nothing. So another number or size of pictures compiles nothing new unless the chunk's length
does.
"""

import dataclasses

SMALLEST = 128


@dataclasses.dataclass(frozen=True, order=True)
class Chunk:
    """The shape of one `programs.extend`."""

    length: int  # tokens per row
    rows: int  # per device of the batch axes
    is_fresh: bool  # starts a prompt; else it goes on from what its slot holds

    @property
    def num_patches(self) -> int:
        return 4 * self.length


def bucket(length: int) -> int:
    """The smallest of 128, 256, 512, ... that holds `length` tokens."""
    return max(SMALLEST, 1 << (length - 1).bit_length())


def chunk_for(length: int, is_fresh: bool, *, is_alone: bool, budget: int, slots: int) -> Chunk:
    """The shape for a chunk of `length` tokens.

    Args:
      is_alone: no other row wants to be extended too.
      budget: tokens of one prefill, over its rows.
      slots: per device of the batch axes.
    """
    size = bucket(length)
    rows = 1 if is_alone else min(slots, max(1, budget // size))
    return Chunk(size, rows, is_fresh)


def plan(max_length: int, max_image_tokens: int, *, budget: int, slots: int) -> list[Chunk]:
    """Every shape that an engine may need, smallest first.

    Args:
      max_length: of a prompt and its answer.
      max_image_tokens: of the largest picture.
    """
    largest = max(bucket(min(budget, max_length)), bucket(min(max_image_tokens, max_length)))
    sizes = [SMALLEST]
    while sizes[-1] < largest:
        sizes.append(2 * sizes[-1])
    return sorted(
        {
            chunk_for(size, is_fresh, is_alone=is_alone, budget=budget, slots=slots)
            for size in sizes
            for is_fresh in (False, True)
            for is_alone in (False, True)
        }
    )
