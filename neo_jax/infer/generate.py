"""Greedy generation: one prefill, then one jitted step per token."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from neo_jax.batch import to_device
from neo_jax.config import ModelConfig
from neo_jax.data.example import Example, collate
from neo_jax.infer.buckets import bucket, patch_bucket
from neo_jax.model import cache as kv
from neo_jax.model.neo import bind
from neo_jax.sharding import batch_rows, put


@functools.partial(jax.jit, static_argnums=0)
def prefill(c: ModelConfig, params: dict, batch: dict) -> tuple[jax.Array, kv.Cache]:
    """Logits [B, V] after each row's prompt, and its cache. See `Neo.prefill`."""
    return bind(c, params).prefill(batch)


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def grow(cache: kv.Cache, length: int) -> kv.Cache:
    """A prompt's cache with room for its answer."""
    return kv.grow(cache, length)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode(
    c: ModelConfig, params: dict, tokens_b: jax.Array, cache: kv.Cache
) -> tuple[jax.Array, kv.Cache]:
    """Logits [B, V] after one more token per row. The cache is updated in place."""
    return bind(c, params).decode(tokens_b, cache)


def padded_batch(example: Example, mesh: Mesh) -> dict:
    """An example alone in a batch of its bucket's shape, on the mesh."""
    length = bucket(len(example.tokens))
    return to_device(collate([example], length, patch_bucket(length, len(example.patches))), mesh)


def greedy(
    c: ModelConfig, params: dict, mesh: Mesh, example: Example, max_new_tokens: int, stop_id: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each token id and the logits [V] that it was chosen from, the stop token included.

    Programs are compiled per bucket (`buckets.py`) of the prompt and of prompt plus answer.
    """
    with jax.set_mesh(mesh):
        logits_bv, cache = prefill(c, params, padded_batch(example, mesh))
        cache = grow(cache, bucket(len(example.tokens) + max_new_tokens))
    for step in range(max_new_tokens):
        logits_v = np.asarray(logits_bv)[0]
        token = int(np.argmax(logits_v))
        yield token, logits_v
        if token == stop_id or step + 1 == max_new_tokens:
            return
        with jax.set_mesh(mesh):
            tokens_b = put(jnp.full(batch_rows(mesh), token, jnp.int32), mesh, "batch")
            logits_bv, cache = decode(c, params, tokens_b, cache)
