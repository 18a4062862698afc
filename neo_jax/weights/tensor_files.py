"""Reads the safetensors files of a checkpoint directory: a list of tensors, and parts of them."""

import collections
import dataclasses
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from neo_jax.errors import InputError
from neo_jax.weights.mapping import GENERATION

INDEX = "model.safetensors.index.json"

# The dtypes that we read and write: safetensors' name, then numpy's.
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a safetensors file. `tensor[index]` reads a part of it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: F32, F16, BF16
    offset: int  # of its first byte in the file

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(DTYPE_NAMES[self.dtype]).itemsize

    def blocks(self, limit: int) -> Iterator[np.ndarray]:
        """Reads the whole tensor, in blocks of rows of about `limit` bytes or less."""
        rows = max(1, limit * self.shape[0] // max(1, self.num_bytes))
        for start in range(0, self.shape[0], rows):
            stop = min(start + rows, self.shape[0])
            yield self[(slice(start, stop), *[slice(None)] * (len(self.shape) - 1))]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of the tensor, and nothing else of the file.

        Whole rows are not memory-mapped: page faults would take longer than the rest of a
        conversion, and mapped pages count as memory of the process.
        """
        dtype, columns = jnp.dtype(DTYPE_NAMES[self.dtype]), index[1:]
        try:
            if any(
                p.indices(n)[:2] != (0, n) for p, n in zip(columns, self.shape[1:], strict=True)
            ):
                mapped = np.memmap(self.file, dtype, "r", self.offset, self.shape)
                return np.array(mapped[index])
            start, stop, _ = index[0].indices(self.shape[0])
            rows = np.empty((stop - start, *self.shape[1:]), dtype)
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.offset + start * (self.num_bytes // max(1, self.shape[0])))
                data = memoryview(rows.reshape(-1).view(np.uint8))
                while len(data):
                    got = file.readinto(data)
                    if not got:
                        raise OSError("the file ends early")
                    data = data[got:]
            return rows
        except (OSError, ValueError) as error:
            raise InputError(f"{self.file}: cannot read {self.key}: {error}") from error


def open_tensors(directory: str | Path) -> dict[str, Tensor]:
    """Opens all tensors of a published checkpoint directory, by key. Reads headers only.

    Raises:
      InputError: naming every file that is missing, truncated or not safetensors, and every key
        that two files hold, that the index lacks, or that is not where the index says.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory")
    index = _read_index(directory)
    names = sorted(set(index.values())) if index else _single_file(directory)
    problems, found, holders = [], {}, collections.defaultdict(list)
    for name in names:
        try:
            for tensor in _read_header(directory / name):
                found[tensor.key] = tensor
                holders[tensor.key].append(name)
        except InputError as error:
            problems.append(str(error))
    for key, files in holders.items():
        if len(files) > 1:
            problems.append(f"{key} is in {len(files)} files: {', '.join(files)}")
        elif index and key not in index:
            problems.append(f"{files[0]} holds {key}, which {INDEX} lacks")
    if not problems:
        for key, name in index.items():
            if holders[key] != [name]:
                problems.append(f"{INDEX} says that {key} is in {name}; it is not")
    for tensor in found.values():
        if tensor.dtype not in DTYPE_NAMES and not GENERATION.search(tensor.key):
            problems.append(
                f"{tensor.file.name}: {tensor.key} is {tensor.dtype}; "
                f"only {', '.join(sorted(DTYPE_NAMES))} are read"
            )
    if problems:
        raise InputError(f"{directory}:\n  " + "\n  ".join(problems))
    return found


def _read_index(directory: Path) -> dict[str, str]:
    """The file name of every key; empty if there is no index."""
    path = directory / INDEX
    if not path.exists():
        return {}
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        names = {str(key): str(name) for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{path}: not an index of safetensors: {error!r}") from error
    for name in names.values():
        if Path(name).name != name:
            raise InputError(f"{path}: {name!r} is not the name of a file beside it")
    return names


def _single_file(directory: Path) -> list[str]:
    names = sorted(path.name for path in directory.glob("model*.safetensors"))
    if not names:
        raise InputError(f"{directory}: no model*.safetensors there")
    if len(names) > 1 and names != ["model.safetensors"]:
        raise InputError(f"{directory}: {len(names)} shards but no {INDEX}")
    return names


def _read_header(path: Path) -> list[Tensor]:
    if not path.exists():
        raise InputError(f"{path}: no such file, though {INDEX} names it")
    try:
        with safe_open(path, framework="numpy"):
            pass  # the library checks that header and size are right
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated or not safetensors: {error}") from error
    header.pop("__metadata__", None)
    return [
        Tensor(
            path, key, tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0]
        )
        for key, entry in header.items()
    ]
