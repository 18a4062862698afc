"""A prefill program's arrays on the host, filled chunk by chunk.

A device of the batch axes has one row of R blocks' tokens. A chunk takes as many blocks as it
touches, so its tokens lie in the row as they lie in their blocks:

    sequence   tokens 0 .. 9 in blocks 5, 8, 2 of 4 tokens; the chunk is [2, 9)
    row        . . 2 3 | 4 5 6 7 | 8 . . .        block_r 5, 8, 2; start_r 2, 4, 8
"""

import dataclasses

import numpy as np

from neo_jax.data.example import Example
from neo_jax.infer.buckets import PrefillBucket
from neo_jax.infer.sampling import Sampling
from neo_jax.infer.sequence import Prefill
from neo_jax.model_config import PATCH_CHANNELS


@dataclasses.dataclass(frozen=True)
class PromptArrays:
    """What the scheduler carries for the runner: `Sequence.request`."""

    example: Example
    settings: Sampling


class PrefillArrays:
    """Arrays as `Neo.prefill` takes them: `batch` [D, T, ...], and `rows`, mostly [D * R].

    Args:
      devices: D, of the batch axes.
      bucket: the program's shape.
      block_size: tokens of a block.
    """

    def __init__(self, devices: int, bucket: PrefillBucket, block_size: int):
        self._num_rows, self._size = bucket.rows, block_size
        self._is_fresh = bucket.context_blocks == 0
        self._used = np.zeros((devices, 3), int)  # rows, key blocks, patches of each device
        count, length = devices * bucket.rows, bucket.rows * block_size
        self.rows = {
            **{name: np.zeros(count, np.int32) for name in ("block_r", "start_r", "first_key_r")},
            "end_dt": np.zeros((devices, length), np.int32),
            "context_blocks_dc": np.zeros((devices, bucket.context_blocks), np.int32),
        }
        self.batch = {
            "tokens": np.zeros((devices, length), np.int32),
            "segments": np.zeros((devices, length), np.int32),
            "thw": np.zeros((devices, length, 3), np.int32),
            "is_image": np.zeros((devices, length), bool),
            "patches": np.zeros((devices, 4 * length, PATCH_CHANNELS), np.uint8),
            "patch_hw": np.zeros((devices, 4 * length, 2), np.int32),
        }

    def add(self, chunk: Prefill) -> int:
        """Puts a chunk behind those that are there; returns the number of its last row."""
        sequence, start, stop, size = chunk.sequence, chunk.start, chunk.stop, self._size
        d, rows = sequence.device, self.rows
        row, keys, _ = self._used[d]
        first, last = start // size, -(-stop // size)
        here = slice(d * self._num_rows + row, d * self._num_rows + row + last - first)
        rows["block_r"][here] = sequence.blocks[first:last]
        rows["start_r"][here] = np.maximum(start, size * np.arange(first, last))
        rows["first_key_r"][here] = size * (row if self._is_fresh else keys)
        if not self._is_fresh:
            rows["context_blocks_dc"][d, keys : keys + last] = sequence.blocks[:last]
            self._used[d, 1] += last
        self._used[d, 0] += last - first
        place = row * size + start % size
        self._put_prompt(chunk, place)
        self._put_outputs(chunk, place)
        self.batch["segments"][d, place : place + stop - start] = 1
        return here.stop - 1

    def _put_prompt(self, chunk: Prefill, place: int) -> None:
        """The chunk's tokens of the prompt, from `place` in its device's row on; their patches."""
        d, batch = chunk.sequence.device, self.batch
        example: Example = chunk.sequence.request.example
        start, stop = chunk.start, min(chunk.stop, len(example.tokens))
        if start >= stop:
            return
        here, there = slice(place, place + stop - start), slice(start, stop)
        for name in ("tokens", "thw", "is_image"):
            batch[name][d, here] = getattr(example, name)[there]
        t = example.thw[:, 0]
        self.rows["end_dt"][d, here] = np.searchsorted(t, t[there], side="right")
        a, b = (4 * int(example.is_image[:end].sum()) for end in (start, stop))
        used = self._used[d, 2]
        batch["patches"][d, used : used + b - a] = example.patches[a:b]
        batch["patch_hw"][d, used : used + b - a] = example.patch_hw[a:b]
        self._used[d, 2] += b - a

    def _put_outputs(self, chunk: Prefill, place: int) -> None:
        """Its tokens that were sampled before the sequence was preempted."""
        sequence, length = chunk.sequence, chunk.sequence.prompt_length
        position_n = np.arange(max(chunk.start, length), chunk.stop)
        if not len(position_n):
            return
        d, place_n = sequence.device, place + position_n - chunk.start
        self.batch["tokens"][d, place_n] = np.array(sequence.output_ids)[position_n - length]
        last_t = sequence.request.example.thw[-1, 0]
        self.batch["thw"][d, place_n, 0] = last_t + 1 + position_n - length
        self.rows["end_dt"][d, place_n] = position_n + 1
