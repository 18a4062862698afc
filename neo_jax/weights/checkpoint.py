"""Our checkpoint directory: an Orbax tree `params` and the description of its model.

    DIR/
      params/            Orbax: the parameters as a nested dict
      neo_jax.json       the ModelConfig
      config.json, tokenizer.json, ...   the published files, unchanged

A training run's directory is a checkpoint too, with `params` in `checkpoints/STEP/`.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from neo_jax.errors import InputError
from neo_jax.model.neo import abstract_params
from neo_jax.model_config import ModelConfig
from neo_jax.sharding import MESH_AXES, axis_sizes, make_mesh
from neo_jax.weights import mapping, orbax_files
from neo_jax.weights.directory import new_directory, read_json
from neo_jax.weights.place import param_target, place_params
from neo_jax.weights.published import read_part
from neo_jax.weights.row import ParamPath
from neo_jax.weights.tensor_files import Tensor

DESCRIPTION = "neo_jax.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One of our checkpoints on disk."""

    config: ModelConfig
    params: Path  # the Orbax tree
    directory: Path  # holds the description, the tokenizer and so on
    lora: dict | None = None  # of a run that trained LoRA factors; see `describe`


def find_checkpoint(path: str | Path, dtype: str | None = None) -> Checkpoint | None:
    """Finds the checkpoint at `path`: a checkpoint directory, or a step of a training run.

    Args:
      path: of a checkpoint, of a training run (its newest step is taken), or of one of its steps.
      dtype: of computation; default: that of the checkpoint's description.

    Returns:
      the checkpoint, or None if there is none of ours at `path`.

    Raises:
      InputError: if the checkpoint has no description, or an unreadable one.
    """
    path = Path(path)
    steps = [
        step
        for parent in (path, path / "checkpoints")
        if parent.is_dir()
        for step in parent.iterdir()
        if step.name.isdigit() and (step / "params").is_dir()
    ]
    if (path / "params").is_dir():
        base = path
    elif steps:
        base = max(steps, key=lambda step: int(step.name))
    else:
        return None
    for directory in (base, *list(base.absolute().parents)[:2]):
        if (directory / DESCRIPTION).exists():
            config, lora = _read_description(directory, dtype)
            return Checkpoint(config, base / "params", directory, lora)
    raise InputError(f"{path}: has params but no {DESCRIPTION} that describes their model")


def describe(c: ModelConfig, lora: dict | None = None) -> str:
    """Returns the content of `neo_jax.json`.

    Args:
      c: the model.
      lora: given if `params` holds LoRA factors: "base", the directory of the base model; "paths"
        of the adapted parameters; "rank" and "scale".
    """
    content = {"format": FORMAT, "model": dataclasses.asdict(c)} | ({"lora": lora} if lora else {})
    return json.dumps(content, indent=2) + "\n"


def write_checkpoint(
    target: str | Path,
    c: ModelConfig,
    tensors: Mapping[str, Tensor],
    dtype: str,
    *,
    mesh_shape: tuple[int, int, int] = (1, 1, 1),
    fill: Callable[[Path], None] = lambda directory: None,
    overwrite: bool = False,
    log: Callable[[str], None] = lambda message: None,
    on_bytes_written: Callable[[int], None] = lambda size: None,
) -> None:
    """Converts published tensors to our checkpoint. The write is atomic.

    Only a few pieces of arrays are in memory at a time.

    Args:
      target: the new directory.
      c: the model; `tensors` must be exactly its tensors (`mapping.check_tensors`).
      tensors: by published key; each part is read when it is needed.
      dtype: of the parameters, "float32" or "bfloat16".
      mesh_shape: arrays are stored in the pieces into which this mesh splits them.
      fill: puts tokenizer and configuration files into the new directory.
      overwrite: replace what is at `target`.
      log: called with a message if an earlier run left an unfinished directory.
      on_bytes_written: called with the bytes of each piece written, for a progress bar.

    Raises:
      InputError: if the target exists or cannot be written, or a tensor cannot be read.
    """
    needed = num_bytes(c, dtype)
    with new_directory(target, needed, overwrite=overwrite, log=log) as directory:
        fill(directory)
        (directory / DESCRIPTION).write_text(describe(c))
        tree = _lazy_params(c, tensors, mesh_shape, dtype, on_bytes_written)
        orbax_files.write_tree(directory / "params", tree)


def _lazy_params(c, tensors, mesh_shape, dtype, on_bytes_written) -> dict:
    """The parameters as a tree of `LazyArray`: each piece is read when Orbax writes it."""
    table = {row.path: row for row in mapping.rows(c)}
    mesh = AbstractMesh(axis_sizes(mesh_shape), MESH_AXES)

    def lazy(path, leaf):
        row = table[tuple(entry.key for entry in path)]
        sources = [tensors[row.key.format(layer=layer)] for layer in mapping.layers_of(row, c)]
        try:
            shard = NamedSharding(mesh, leaf.sharding.spec).shard_shape(leaf.shape)
        except ValueError as error:
            raise InputError(f"mesh {mesh_shape} does not divide {row.path}: {error}") from error
        item = np.dtype(leaf.dtype)
        return orbax_files.LazyArray(
            shape=leaf.shape,
            dtype=item,
            chunk=orbax_files.choose_chunk(leaf.shape, shard, item.itemsize, row.is_layered),
            read=lambda index: read_part(row, sources, leaf, index),
            on_bytes_written=on_bytes_written,
        )

    return jax.tree_util.tree_map_with_path(lazy, abstract_params(c, dtype=dtype))


def load_checkpoint(
    checkpoint: Checkpoint, dtype: str, mesh: Mesh | None = None, weights: str | None = None
) -> tuple[ModelConfig, dict]:
    """Restores the parameters of a checkpoint onto a mesh.

    Args:
      checkpoint: one of ours, with whole parameters (no LoRA factors).
      dtype: of the parameters.
      mesh: default: `make_mesh` for this model.
      weights: "int8" quantises the matrices while they are read.

    Raises:
      InputError: naming the directory, if it is damaged or holds other parameters.
    """
    c = checkpoint.config
    if mesh is None:
        mesh = make_mesh(num_key_value_heads=c.num_key_value_heads)
    target = param_target(c, mesh, dtype, weights)
    if weights is None:
        return c, orbax_files.read_tree(checkpoint.params, target)
    stores = open_params(checkpoint)

    def read(path, leaf, index):
        return stores[path][index].read().result().astype(leaf.dtype)

    try:
        return c, place_params(target, read)
    except (ValueError, OSError) as error:
        raise InputError(f"{checkpoint.params}: cannot read: {error}") from error


def open_params(checkpoint: Checkpoint) -> dict[ParamPath, ts.TensorStore]:
    """Opens the parameters, by path. `store[index].read().result()` reads a part of one.

    Raises:
      InputError: if they cannot be read, or are not those of the checkpoint's model.
    """
    stores = orbax_files.open_tree(checkpoint.params)
    wanted = {
        tuple(entry.key for entry in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(checkpoint.config))
    }
    problems = [
        f"{'/'.join(path)}: {stores[path].shape if path in stores else 'missing'}, "
        f"the model has {wanted.get(path, 'no such parameter')}"
        for path in sorted(wanted.keys() | stores.keys())
        if path not in stores or stores[path].shape != wanted.get(path)
    ]
    if problems:
        raise InputError("\n  ".join([f"{checkpoint.params}: not this model's:", *problems]))
    return stores


def num_bytes(c: ModelConfig, dtype: str) -> int:
    """Bytes of all parameters in `dtype`."""
    leaves = jax.tree.leaves(abstract_params(c))
    return sum(math.prod(leaf.shape) for leaf in leaves) * jnp.dtype(dtype).itemsize


def _read_description(directory: Path, dtype: str | None) -> tuple[ModelConfig, dict | None]:
    path = directory / DESCRIPTION
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise InputError(f"{path}: format {content.get('format')!r}; this version reads {FORMAT}")
    try:
        c = ModelConfig(**content["model"])
    except (TypeError, KeyError) as error:
        raise InputError(f"{path}: {error}") from error
    return c if dtype is None else dataclasses.replace(c, dtype=dtype), content.get("lora")
