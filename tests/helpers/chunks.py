"""Chunks of prompts laid out as `Neo.prefill` takes them, for tests of the device's side."""

import dataclasses

import numpy as np

from neo_jax.batch import to_device
from neo_jax.data.example import Example, collate
from neo_jax.sharding import batch_rows, put


@dataclasses.dataclass(frozen=True)
class PromptChunk:
    """Tokens [start, stop) of a sequence whose blocks are on a device of the batch axes."""

    example: Example
    blocks: list[int]
    start: int
    stop: int
    device: int = 0


def lay_out(
    chunks: list[PromptChunk], rows: int, size: int, context: int, mesh
) -> tuple[dict, dict]:
    """batch and where for `Neo.prefill`, and the number of the last row of each chunk.

    Args:
      rows: on each device.
      size: tokens of a block.
      context: C, 0 if all chunks begin their sequences.
    """
    devices, length = batch_rows(mesh), rows * size
    row_arrays = ("block_r", "start_r", "first_key_r")
    where = {name: np.zeros((devices, rows), np.int32) for name in row_arrays}
    where["end_dt"] = np.zeros((devices, length), np.int32)
    where["context_blocks_dc"] = np.zeros((devices, context), np.int32)
    batch = {name: np.repeat(array, devices, 0) for name, array in _padding(length).items()}
    used, seen, patches = ([0] * devices for _ in range(3))
    last = []
    for one in chunks:
        d, example, first = one.device, one.example, used[one.device]
        for number in range(one.start // size, -(-one.stop // size)):
            r = used[d]
            where["block_r"][d, r] = one.blocks[number]
            where["start_r"][d, r] = max(one.start, number * size)
            where["first_key_r"][d, r] = size * (seen[d] if context else first)
            used[d] += 1
        last.append(d * rows + used[d] - 1)
        if context:
            needed = one.blocks[: -(-one.stop // size)]
            where["context_blocks_dc"][d, seen[d] : seen[d] + len(needed)] = needed
            seen[d] += len(needed)
        begin = first * size + one.start % size
        here = slice(begin, begin + one.stop - one.start)
        there = slice(one.start, one.stop)
        for name in ("tokens", "thw", "is_image"):
            batch[name][d, here] = getattr(example, name)[there]
        batch["segments"][d, here] = 1
        t = example.thw[:, 0]
        where["end_dt"][d, here] = np.searchsorted(t, t[there], side="right")
        a, b = (4 * int(example.is_image[:place].sum()) for place in (one.start, one.stop))
        into = slice(patches[d], patches[d] + b - a)
        batch["patches"] = batch["patches"].astype(example.patches.dtype)
        batch["patches"][d, into], batch["patch_hw"][d, into] = (
            example.patches[a:b],
            example.patch_hw[a:b],
        )
        patches[d] += b - a
    where = {n: a.reshape(-1) if n in row_arrays else a for n, a in where.items()}
    placed = {n: put(a, mesh, "batch", *[None] * (a.ndim - 1)) for n, a in where.items()}
    return to_device(batch, mesh), placed, last


def _padding(length: int) -> dict:
    empty = Example(
        np.zeros(0, np.int32),
        np.zeros((0, 3), np.int32),
        np.zeros(0, bool),
        np.zeros((0, 768), np.uint8),
        np.zeros((0, 2), np.int32),
    )
    return collate([empty], length, 4 * length)
