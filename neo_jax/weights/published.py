"""Reads a published checkpoint directory: its model, its tensors, its parameters as arrays."""

import logging
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from neo_jax.errors import InputError
from neo_jax.model_config import ModelConfig
from neo_jax.sharding import make_mesh
from neo_jax.weights import mapping
from neo_jax.weights.directory import read_json
from neo_jax.weights.place import param_target, place_params
from neo_jax.weights.row import Index, Row
from neo_jax.weights.tensor_files import Tensor, open_tensors

LOG = logging.getLogger(__name__)

HEAD = "language_model.lm_head.weight"


def read_config(
    directory: str | Path, tensors: dict[str, Tensor], dtype: str = "bfloat16"
) -> ModelConfig:
    """Reads the model that a directory's config.json and tensors describe."""
    path = Path(directory) / "config.json"
    hf = read_json(path)
    says_tied = (hf.get("llm_config") or {}).get("tie_word_embeddings")
    # Of a model that config.json calls untied, a missing head means a damaged checkpoint.
    tied = HEAD not in tensors and says_tied is not False
    try:
        layout = mapping.detect_layout(tensors)
        return ModelConfig.from_hf(hf, qk_layout=layout, tie_word_embeddings=tied, dtype=dtype)
    except InputError as error:
        raise InputError(f"{path.parent}: {error}") from error


def open_published(
    directory: str | Path, dtype: str = "bfloat16"
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Opens a published directory: its model, and its tensors by key. Reads headers only.

    Tensors of U1's generation branch are left out, with a warning that lists them.

    Raises:
      InputError: naming every file, key and shape that does not fit the model.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory")
    if not (directory / "config.json").exists():
        raise InputError(f"{directory}: no config.json there, so no checkpoint directory")
    tensors = open_tensors(directory)
    c = read_config(directory, tensors, dtype)
    try:
        skipped = mapping.check_tensors({key: t.shape for key, t in tensors.items()}, c)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from error
    if skipped:
        LOG.warning(
            "%s: left out %d tensors of the generation branch: %s",
            directory, len(skipped), ", ".join(skipped),
        )  # fmt: skip
    return c, {key: tensor for key, tensor in tensors.items() if key not in skipped}


def stored_dtype(tensors: Mapping[str, Tensor]) -> str:
    """The narrower of "bfloat16" and "float32" that holds every tensor exactly."""
    return "bfloat16" if all(t.dtype == "BF16" for t in tensors.values()) else "float32"


def load_published(
    directory: str | Path,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    weights: str | None = None,
) -> tuple[ModelConfig, dict]:
    """Loads a published checkpoint onto a mesh.

    Args:
      directory: holds config.json and model*.safetensors.
      dtype: of the parameters and of matrix products.
      mesh: of the arrays; default: `make_mesh` for this model.
      weights: "int8" quantises the matrices while they are read.

    Returns:
      the configuration and the parameters.

    Raises:
      InputError: naming every file, key and shape that does not fit the model.
    """
    c, tensors = open_published(directory, dtype)
    if mesh is None:
        mesh = make_mesh(num_key_value_heads=c.num_key_value_heads)
    return c, read_params(c, tensors, param_target(c, mesh, dtype, weights))


def read_params(c: ModelConfig, tensors: dict[str, Tensor], target: dict) -> dict:
    """Reads every parameter into the shape, dtype and sharding of `target` (`place.py`)."""
    table = {row.path: row for row in mapping.rows(c)}

    def read(path, leaf, index):
        row = table[path]
        keys = [row.key.format(layer=layer) for layer in mapping.layers_of(row, c)]
        return read_part(row, [tensors[key] for key in keys], leaf, index)

    return place_params(target, read)


def read_part(row: Row, tensors: list[Tensor], leaf, index: Index) -> np.ndarray:
    """Reads the part `index` of a parameter, from its tensor or from the tensors of its layers."""
    shape = [len(range(*i.indices(n))) for i, n in zip(index, leaf.shape, strict=True)]
    out = np.empty(shape, jnp.dtype(leaf.dtype))
    if not row.is_layered:
        row.read(tensors[0].__getitem__, index, out)
        return out
    for slot, tensor in zip(out, tensors[index[0]], strict=True):
        row.read(tensor.__getitem__, index[1:], slot)
    return out
