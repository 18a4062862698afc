"""Writes parameters as a published directory, which the official PyTorch code loads."""

import collections
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax.errors import InputError
from neo_jax.model.int8 import Int8Matrix
from neo_jax.model.neo import abstract_params
from neo_jax.model_config import ModelConfig
from neo_jax.weights import mapping
from neo_jax.weights.checkpoint import DESCRIPTION
from neo_jax.weights.directory import copy_side_files, new_directory, read_json
from neo_jax.weights.row import Index, ParamPath
from neo_jax.weights.tensor_files import DTYPE_NAMES
from neo_jax.weights.write import Block, num_bytes, write_tensors

# Reads a part of a parameter, given its path and an index.
ReadLeaf = Callable[[ParamPath, Index], np.ndarray]

SAFETENSORS_DTYPE = {name: short for short, name in DTYPE_NAMES.items()}
_BLOCK_BYTES = 64 * 2**20


def save_hf(neo_or_params, config: ModelConfig, path: str | Path, **options) -> None:
    """Writes a model that is in memory as a published directory.

    Args:
      neo_or_params: what `neo_jax.load` returns, or a tree of parameters. This process must be
        able to read all of it. A loaded model no longer has its config.json and tokenizer files:
        copy them, or use `neo-ov convert to-hf`.
      config: of the model.
      path: the new directory.
      **options: `dtype`, `shard_size`, `overwrite` of `write_published`.

    Raises:
      InputError: if the directory exists or cannot be written, or the parameters are int8 or not
        those of `config`.
    """
    params = getattr(neo_or_params, "params", neo_or_params)
    if isinstance(params["embed"], Int8Matrix):
        raise InputError("int8 is no published type: load without weights='int8' to export")
    given, wanted = (jax.tree.map(jnp.shape, tree) for tree in (params, abstract_params(config)))
    if given != wanted:
        raise InputError("the parameters are not of this config's model: give the config they have")
    leaves = _HostLeaves(params)
    dtype = options.pop("dtype", None) or params["embed"].dtype.name
    write_published(path, config, leaves.read, dtype, **options)


def write_published(
    path: str | Path,
    c: ModelConfig,
    read_leaf: ReadLeaf,
    dtype: str,
    *,
    shard_size: int = 5 * 10**9,
    side_files: Path | None = None,
    overwrite: bool = False,
    log: Callable[[str], None] = lambda message: None,
    on_bytes_written: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes a published directory: safetensors and config.json. The write is atomic.

    Args:
      path: the new directory.
      c: the model.
      read_leaf: reads a part of a parameter: one layer, or a block of rows.
      dtype: of the tensors, "float32" or "bfloat16".
      shard_size: bytes of a file.
      side_files: directory whose tokenizer, configuration and code files are copied.
      overwrite: replace what is at `path`.
      log, on_bytes_written: as of `checkpoint.write_checkpoint`.

    Raises:
      InputError: if the directory exists or cannot be written.
    """
    if dtype not in SAFETENSORS_DTYPE:
        raise InputError(f"dtype {dtype!r}: use one of {', '.join(SAFETENSORS_DTYPE)}")
    if shard_size < 1:
        raise InputError(f"a shard size of {shard_size} bytes is not possible")
    short, plan = SAFETENSORS_DTYPE[dtype], mapping.expected_tensors(c)
    rows = collections.defaultdict(list)
    for row in mapping.rows(c):
        for layer in mapping.layers_of(row, c):
            rows[row.key.format(layer=layer)].append((row, layer))

    def blocks(key: str) -> Iterator[Block]:
        return _blocks(rows[key], c, read_leaf, jnp.dtype(dtype))

    needed = sum(num_bytes(shape, short) for shape in plan.values())
    with new_directory(path, needed, overwrite=overwrite, log=log) as directory:
        hf = c.to_hf(dtype)
        if side_files:
            copy_side_files(side_files, directory)
            (directory / DESCRIPTION).unlink(missing_ok=True)
            if (directory / "config.json").exists():
                stored = read_json(directory / "config.json")
                hf = _published_config(stored, hf) if _describes(stored, c) else hf
        (directory / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
        write_generation_config(directory, hf)
        write_tensors(directory, plan, short, blocks, shard_size, on_bytes_written)


def write_generation_config(directory: Path, hf: dict) -> None:
    """Writes a generation_config.json, unless the directory has one."""
    path, llm = directory / "generation_config.json", hf["llm_config"]
    if not path.exists():
        ids = {
            name: llm[name]
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")
            if llm.get(name) is not None
        }
        path.write_text(json.dumps({"_from_model_config": True, **ids}, indent=2) + "\n")


def _blocks(rows, c: ModelConfig, read_leaf: ReadLeaf, dtype) -> Iterator[Block]:
    """Functions that make one tensor: one for each block of rows, if both layouts are the same."""
    first, layer = rows[0]
    if layer is not None or first.channel or first.tensor != first.ours:
        yield lambda: _make_tensor(rows, c, read_leaf, dtype)
        return
    total, *rest = first.tensor_shape
    step = max(1, _BLOCK_BYTES // (int(np.prod(rest, dtype=np.int64)) * dtype.itemsize))
    for start in range(0, total, step):
        index = (slice(start, min(start + step, total)), *[slice(None)] * len(rest))
        yield functools.partial(_read_rows, read_leaf, first.path, index, dtype)


def _read_rows(read_leaf: ReadLeaf, path: ParamPath, index: Index, dtype) -> np.ndarray:
    return read_leaf(path, index).astype(dtype, copy=False)


def _make_tensor(rows, c: ModelConfig, read_leaf: ReadLeaf, dtype) -> np.ndarray:
    """A published tensor; with fused queries, two rows of the key table fill it."""
    tensor = np.empty(rows[0][0].tensor_shape, dtype)
    for row, layer in rows:
        index = (slice(None),) * row.our_rank
        if layer is not None:
            slot = layer - next(iter(mapping.layers_of(row, c)))
            leaf = read_leaf(row.path, (slice(slot, slot + 1), *index))[0]
        else:
            leaf = read_leaf(row.path, index)
        row.write(leaf.astype(dtype, copy=False), tensor)
    return tensor


def _describes(stored: dict, c: ModelConfig) -> bool:
    """Whether a config.json describes this model: it may have come with a tokenizer alone."""
    given = {name: getattr(c, name) for name in ("qk_layout", "tie_word_embeddings", "dtype")}
    try:
        return ModelConfig.from_hf(stored, **given) == c
    except InputError:
        return False


def _published_config(stored: dict, ours: dict) -> dict:
    """The stored config.json, with the type, depth and tied head of what is written now.

    One-element lists become numbers: the official classes write such lists but cannot read them.
    """
    result = {**stored, "torch_dtype": ours["torch_dtype"]}
    for section in ("llm_config", "vision_config"):
        fields = {**stored[section], "torch_dtype": ours["torch_dtype"]}
        for name, value in fields.items():
            if isinstance(value, list) and not isinstance(ours[section].get(name, []), list):
                fields[name] = value[0]
        result[section] = fields
    result["llm_config"]["extra_num_layers"] = ours["llm_config"]["extra_num_layers"]
    for fields in (result, result["llm_config"]):
        fields["tie_word_embeddings"] = ours["tie_word_embeddings"]
    return result


class _HostLeaves:
    """Reads parameters from device memory. The last one read stays on the host."""

    def __init__(self, params: dict):
        self._leaves = {
            tuple(entry.key for entry in path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        }
        self._last: dict = {}

    def read(self, path: ParamPath, index: Index) -> np.ndarray:
        if path not in self._last:
            self._last = {path: np.asarray(self._leaves[path])}
        return self._last[path][index]
