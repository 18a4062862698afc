"""The safetensors files of a checkpoint directory: which tensors they hold, and parts of them."""

import collections
import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from neo_jax.errors import InputError

INDEX = "model.safetensors.index.json"

_DTYPES = {"F32", "F16", "BF16"}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor is, and what."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: F32, F16, BF16

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """A part of it. Only that part is read.

        The file is opened anew each time, so that its pages leave memory with the handle.
        """
        try:
            with safe_open(self.file, framework="numpy") as file:
                return file.get_slice(self.key)[index]
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.file}: cannot read {self.key}: {error}") from error


def open_tensors(directory: str | Path) -> dict[str, Tensor]:
    """All tensors of a published checkpoint directory, by key. Reads headers only.

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
        if tensor.dtype not in _DTYPES:
            problems.append(
                f"{tensor.file.name}: {tensor.key} is {tensor.dtype}; "
                f"only {', '.join(sorted(_DTYPES))} are read"
            )
    if problems:
        raise InputError(f"{directory}:\n  " + "\n  ".join(problems))
    return found


def _read_index(directory: Path) -> dict[str, str]:
    """Key -> file name; empty when there is no index."""
    path = directory / INDEX
    if not path.exists():
        return {}
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        return {str(key): str(name) for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not an index of safetensors: {error!r}") from error


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
        with safe_open(path, framework="numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return [
                Tensor(path, key, tuple(part.get_shape()), part.get_dtype())
                for key, part in slices.items()
            ]
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated or not safetensors: {error}") from error
