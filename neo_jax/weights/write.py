"""Writes a published checkpoint directory, tensor by tensor."""

import collections
import itertools
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from neo_jax.weights.tensor_files import DTYPE_NAMES, INDEX

# How many blocks threads compute while one is written.
BLOCKS_AT_ONCE = 3

Plan = Mapping[str, tuple[int, ...]]  # key -> shape
Block = Callable[[], np.ndarray]  # computes a block of rows of a tensor


def write_tensors(
    directory: Path,
    plan: Plan,
    dtype: str,
    blocks: Callable[[str], Iterable[Block]],
    shard_size: int,
    on_bytes_written: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes safetensors shards and, if there are several, their index.

    The safetensors library writes whole files from memory. This holds only a few blocks of rows.

    Args:
      directory: must exist; the caller makes the write atomic (`directory.new_directory`).
      plan: every tensor's key and shape, in the order of writing.
      dtype: F32, F16 or BF16.
      blocks: key -> functions that compute the tensor's blocks of rows, in order.
      shard_size: bytes that a shard holds at most, unless a single tensor is larger.
      on_bytes_written: called with the bytes of each block written, for a progress bar.
    """
    shards = list(_shards(plan, dtype, shard_size))
    weight_map, total = {}, 0
    with ThreadPoolExecutor(BLOCKS_AT_ONCE) as threads:
        computed = _prefetch(threads, (block for key in plan for block in blocks(key)))
        for number, keys in enumerate(shards, 1):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            shard = {key: plan[key] for key in keys}
            total += _write_shard(directory / name, shard, dtype, computed, on_bytes_written)
            weight_map |= dict.fromkeys(keys, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def num_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a tensor; `dtype` is F32, F16 or BF16."""
    return int(np.prod(shape, dtype=np.int64)) * jnp.dtype(DTYPE_NAMES[dtype]).itemsize


def _shards(plan: Plan, dtype: str, shard_size: int) -> Iterator[list[str]]:
    """The keys of each file."""
    keys, size = [], 0
    for key, shape in plan.items():
        tensor = num_bytes(shape, dtype)
        if keys and size + tensor > shard_size:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += tensor
    yield keys


def _prefetch(threads: ThreadPoolExecutor, blocks: Iterator[Block]) -> Iterator[np.ndarray]:
    """The blocks in order; threads compute the next BLOCKS_AT_ONCE meanwhile."""
    waiting = collections.deque(
        threads.submit(block) for block in itertools.islice(blocks, BLOCKS_AT_ONCE)
    )
    while waiting:
        array = waiting.popleft().result()
        waiting.extend(threads.submit(block) for block in itertools.islice(blocks, 1))
        yield array


def _write_shard(
    path: Path, plan: Plan, dtype: str, computed: Iterator[np.ndarray], on_bytes_written
) -> int:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for key, shape in plan.items():
        end = offset + num_bytes(shape, dtype)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins on a multiple of 8
    with path.open("wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, shape in plan.items():
            rows = 0
            while rows < shape[0]:
                block = next(computed)
                rows += len(block)
                if block.shape[1:] != tuple(shape[1:]) or block.dtype.name != DTYPE_NAMES[dtype]:
                    raise ValueError(f"{key}: got {block.dtype} {block.shape}, planned {shape}")
                data = memoryview(np.ascontiguousarray(block).reshape(-1).view(np.uint8))
                on_bytes_written(len(data))
                while len(data):
                    data = data[file.write(data) :]
            if rows != shape[0]:
                raise ValueError(f"{key}: got {rows} rows, planned {shape}")
    return offset
