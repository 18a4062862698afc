"""Our checkpoint directory: an Orbax tree `params`, with the model's description beside it.

    DIR/
      params/            Orbax: the parameters as a nested dict
      neo_jax.json       the ModelConfig
      config.json, tokenizer.json, ...   the published files, as they came

A training run's directory is one too, its `params` a level down in `checkpoints/STEP/`.
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
from neo_jax.weights.tensor_files import Tensor

DESCRIPTION = "neo_jax.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One of our checkpoints on disk."""

    config: ModelConfig
    params: Path  # the Orbax tree
    directory: Path  # of the description, the tokenizer and so on
    lora: dict | None = None  # of a run that trained factors: `describe`


def find_checkpoint(path: str | Path, dtype: str | None = None) -> Checkpoint | None:
    """The checkpoint at `path`: its directory, a step of a training run, or the run's newest step.

    Returns None when there is nothing like it. `dtype` is the compute type of its config.

    Raises:
      InputError: when it lacks its description or that is not readable.
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
    raise InputError(f"{path}: has params but no {DESCRIPTION} that says of what model")


def describe(c: ModelConfig, lora: dict | None = None) -> str:
    """The content of `neo_jax.json`.

    Args:
      lora: where `params` holds low-rank factors: "base", the directory of the model they change;
        "paths" of the changed parameters; "rank" and "scale".
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
    """Writes published tensors as our checkpoint, whole or not at all, a few pieces at a time.

    Args:
      target: the new directory.
      c: the model; `tensors` must be exactly its (`mapping.check_tensors`).
      tensors: by published key; parts of them are read as they are needed.
      dtype: "float32" or "bfloat16" of the parameters.
      mesh_shape: arrays are stored in pieces as this mesh splits them.
      fill: puts tokenizer and configuration files into the new directory.
      overwrite: replace what is at `target`.
      log, on_bytes_written: told of an unfinished earlier run, and of the bytes written.

    Raises:
      InputError: when the target exists or cannot be written, or a tensor cannot be read.
    """
    needed = num_bytes(c, dtype)
    with new_directory(target, needed, overwrite=overwrite, log=log) as directory:
        fill(directory)
        (directory / DESCRIPTION).write_text(describe(c))
        tree = _lazy_params(c, tensors, mesh_shape, dtype, on_bytes_written)
        orbax_files.write_tree(directory / "params", tree)


def _lazy_params(c, tensors, mesh_shape, dtype, on_bytes_written) -> dict:
    """The parameters as arrays that are read from `tensors` while they are written."""
    table = {row.path: row for row in mapping.rows(c)}
    mesh = AbstractMesh(axis_sizes(mesh_shape), MESH_AXES)

    def pending(path, leaf):
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

    return jax.tree_util.tree_map_with_path(pending, abstract_params(c, dtype=dtype))


def load_checkpoint(
    checkpoint: Checkpoint, dtype: str, mesh: Mesh | None = None, weights: str | None = None
) -> tuple[ModelConfig, dict]:
    """Restores the parameters onto a mesh, in `dtype`, the matrices in int8 if `weights` says so.

    Raises:
      InputError: naming the directory, when it is damaged or holds other parameters.
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


def open_params(checkpoint: Checkpoint) -> dict[mapping.Path, ts.TensorStore]:
    """The parameters by path, to read parts of.

    Raises:
      InputError: when they cannot be read or are not those of the checkpoint's model.
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
