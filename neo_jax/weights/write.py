"""Writes a published checkpoint directory, tensor by tensor."""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from neo_jax.weights.tensor_files import INDEX

# As safetensors and numpy name them.
NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_SIZES = {"F32": 4, "BF16": 2, "F16": 2}

Plan = Mapping[str, tuple[int, ...]]  # key -> shape


def write_tensors(
    directory: Path,
    plan: Plan,
    dtype: str,
    get: Callable[[str], np.ndarray],
    shard_size: int,
    wrote: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes safetensors shards and, if there are several, their index.

    The safetensors library writes whole files from memory; this holds one tensor at a time.

    Args:
      directory: must exist; the caller makes the whole atomic.
      plan: every tensor's key and shape, in the order of writing.
      dtype: F32, F16 or BF16.
      get: key -> array of that shape and dtype.
      shard_size: bytes that a shard holds at most, unless a single tensor is larger.
      wrote: told the bytes of each tensor written, for a progress bar.
    """
    shards = list(_shards(plan, dtype, shard_size))
    weight_map, total = {}, 0
    for number, keys in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        total += _write_shard(directory / name, {key: plan[key] for key in keys}, dtype, get, wrote)
        weight_map |= dict.fromkeys(keys, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def num_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * _SIZES[dtype]


def _shards(plan: Plan, dtype: str, shard_size: int) -> Iterator[list[str]]:
    keys, size = [], 0
    for key, shape in plan.items():
        tensor = num_bytes(shape, dtype)
        if keys and size + tensor > shard_size:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += tensor
    yield keys


def _write_shard(path: Path, plan: Plan, dtype: str, get, wrote) -> int:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for key, shape in plan.items():
        end = offset + num_bytes(shape, dtype)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins on a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, shape in plan.items():
            array = get(key)
            if array.shape != tuple(shape) or array.dtype.name != NAMES[dtype]:
                raise ValueError(f"{key}: got {array.dtype} {array.shape}, planned {dtype} {shape}")
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            file.write(data)
            wrote(len(data))
    return offset
