"""One document alone through the model, for a look at its numbers."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from neo_jax.batch import to_device
from neo_jax.data.example import Example, collate, make_example
from neo_jax.data.tokenizer import NeoTokenizer
from neo_jax.errors import InputError
from neo_jax.infer.buckets import padded_length
from neo_jax.model.neo import bind
from neo_jax.model_config import PATCH_CHANNELS, ModelConfig


def document(
    c: ModelConfig,
    tokenizer: NeoTokenizer,
    token_ids: Sequence[int],
    pixel_values: np.ndarray | None,
    grid_hw: np.ndarray | None,
) -> Example:
    """Of [L] ids, [P, 768] patches and [n, 2] grids, as `Pipeline.logits` takes them.

    Raises:
      InputError: when shapes, ids or the number of visual tokens are wrong.
    """
    if (pixel_values is None) != (grid_hw is None):
        raise InputError("give pixel_values and grid_hw both, or neither")
    if pixel_values is None:
        pixel_values, grid_hw = np.zeros((0, PATCH_CHANNELS), np.float32), np.zeros((0, 2), int)
    grid_hw = np.asarray(grid_hw)
    wanted = (int(grid_hw.prod(axis=1).sum()), PATCH_CHANNELS)
    if np.shape(pixel_values) != wanted:
        raise InputError(f"pixel_values is {np.shape(pixel_values)}, grid_hw asks for {wanted}")
    token_ids = np.asarray(token_ids)
    if token_ids.ndim != 1 or not len(token_ids) or token_ids.dtype.kind not in "iu":
        raise InputError(f"token_ids is {token_ids.dtype} {token_ids.shape}: give [L] integers")
    if not 0 <= token_ids.min() <= token_ids.max() < c.vocab_size:
        raise InputError(f"token ids must lie in 0..{c.vocab_size - 1}")
    return make_example(token_ids, np.asarray(pixel_values), grid_hw, tokenizer)


def padded(example: Example, mesh: Mesh) -> dict:
    """An example alone in a batch of its bucket's shape, on the mesh."""
    length = padded_length(len(example.tokens))
    return to_device(collate([example], length, 4 * length * bool(len(example.patches))), mesh)


@functools.partial(jax.jit, static_argnums=0)
def logits(c: ModelConfig, params: dict, batch: dict) -> jax.Array:
    """[B, L, V] float32."""
    return bind(c, params)(batch)


@functools.partial(jax.jit, static_argnums=0)
def inputs(c: ModelConfig, params: dict, batch: dict) -> jax.Array:
    """[B, L, D]: what the decoder starts with."""
    return bind(c, params).inputs(batch)


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(c: ModelConfig, params: dict, batch: dict) -> tuple[jax.Array, ...]:
    """As `Neo.hidden_states`: before, after each layer, normed."""
    return bind(c, params).hidden_states(batch)
