"""The few shapes that programs are compiled for, known before the first request.

Prompts are put into the cache in rows of 64 tokens, so many at once: 1, 2, 3, 4, 6, 8, 12, 16, ...
as far as the prefill budget goes. Several prompts share them, a long prompt takes several times as
many; at least two of three rows are used. A picture is never cut, so there are as many rows as the
largest picture needs. Every row has room for 4 patches per token, which always suffices because a
visual token is 4 patches, and embedding an unused patch costs next to nothing. So the number and
size of pictures and the length of prompts compile nothing new.
"""

import dataclasses

ROW = 64  # tokens


@dataclasses.dataclass(frozen=True, order=True)
class PrefillBucket:
    """The shape of one `programs.prefill`."""

    rows: int  # of ROW tokens, per device of the batch axes
    is_fresh: bool  # prompts begin in it; else they go on from what their slots hold


def rows_for(length: int) -> int:
    """How many rows `length` tokens of a prompt take."""
    return -(-length // ROW)


def padded_length(length: int) -> int:
    """The smallest of 128, 256, 512, ... that holds `length` tokens."""
    return max(128, 1 << (length - 1).bit_length())


def bucket_for(rows: int, is_fresh: bool) -> PrefillBucket:
    """The smallest shape that has so many rows."""
    size = 1 << (rows - 1).bit_length()  # the next power of two, or three quarters of it
    return PrefillBucket(size // 4 * 3 if size >= 4 and rows <= size // 4 * 3 else size, is_fresh)


def plan(max_length: int, max_image_tokens: int, *, budget: int) -> list[PrefillBucket]:
    """Every shape that an engine may need, smallest first.

    Args:
      max_length: of a prompt and its answer.
      max_image_tokens: of the largest picture.
      budget: tokens of one prefill.
    """
    most = max(rows_for(budget), rows_for(min(max_image_tokens, max_length)))
    return sorted(
        {bucket_for(rows, is_fresh) for rows in range(1, most + 1) for is_fresh in (False, True)}
    )
