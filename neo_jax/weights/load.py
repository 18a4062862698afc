"""Loads a checkpoint directory of either layout, published or ours."""

from pathlib import Path

import jax
from jax.sharding import Mesh, NamedSharding

from neo_jax.errors import InputError
from neo_jax.model import lora
from neo_jax.model_config import ModelConfig
from neo_jax.weights.checkpoint import DESCRIPTION, Checkpoint, find_checkpoint, load_checkpoint
from neo_jax.weights.orbax_files import read_tree
from neo_jax.weights.published import load_published


def side_directory(path: str | Path) -> Path:
    """The directory that holds a checkpoint's tokenizer and configuration.

    Raises:
      InputError: if `path` is not a checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such directory")
    checkpoint = find_checkpoint(path)
    if checkpoint is None and not (path / "config.json").exists():
        raise InputError(f"{path}: neither a config.json nor params there, so no checkpoint")
    return checkpoint.directory if checkpoint else path


def load_params(
    path: str | Path, dtype: str, mesh: Mesh | None, weights: str | None = None
) -> tuple[ModelConfig, dict]:
    """Loads a checkpoint of either layout onto a mesh.

    Each device's shard is read separately, so no host holds the whole model.

    Args:
      path: the directory.
      dtype: of the parameters and of matrix products.
      mesh: of the arrays; default: `make_mesh` for this model.
      weights: "int8" makes the large matrices `Int8Matrix`, quantised while they are read.

    Returns:
      the configuration and the parameters. A LoRA run's factors are merged into its base model.

    Raises:
      InputError: for another value of `weights`, or a file, key or shape that does not fit.
    """
    if weights not in (None, "int8"):
        raise InputError(f"weights {weights!r}: use 'int8', or None for those of the checkpoint")
    checkpoint = find_checkpoint(path, dtype)
    if checkpoint and checkpoint.lora:
        return _load_lora(checkpoint, dtype, mesh, weights)
    if checkpoint:
        return load_checkpoint(checkpoint, dtype, mesh, weights)
    return load_published(path, dtype, mesh, weights)


def _load_lora(
    checkpoint: Checkpoint, dtype: str, mesh: Mesh | None, weights: str | None
) -> tuple[ModelConfig, dict]:
    """Loads the base model of a LoRA run and merges the run's factors into it."""
    about = checkpoint.lora
    if weights:
        raise InputError(
            f"{checkpoint.directory}: weights={weights!r} does not work with LoRA factors: "
            "first write the merged model, with neo-ov convert to-hf --merge-lora"
        )
    if not Path(about["base"]).is_dir():
        raise InputError(
            f"{checkpoint.directory / DESCRIPTION}: the base model {about['base']} is not there: "
            "change the path in this file to where it is now"
        )
    _, params = load_params(about["base"], dtype, mesh)
    mesh = jax.tree.leaves(params)[0].sharding.mesh

    def make(params):
        key = jax.random.key(0)
        return lora.new_factors(params, about["paths"], about["rank"], key)

    with jax.set_mesh(mesh):
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, leaf.sharding.spec)
            ),
            jax.eval_shape(make, params),
        )
        factors = read_tree(checkpoint.params, target)
        merge = jax.jit(lora.merge_lora, static_argnums=2, donate_argnums=1)
        return checkpoint.config, merge(factors, params, about["scale"])
