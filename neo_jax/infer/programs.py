"""The device's side of generation: three jitted programs over one state of fixed shape.

The state is a dict, donated to each program and given back: the cache (`model/kv_cache.py`), and
per slot `tokens_b` (the last token), `index_b` (how many were generated), `seen_bv` (which are
penalised) and `settings` (`sampling.row_settings`).
"""

import functools

import jax
import jax.numpy as jnp

from neo_jax.infer import sampling
from neo_jax.model import kv_cache as kv
from neo_jax.model.neo import bind
from neo_jax.model_config import ModelConfig
from neo_jax.sharding import spec

State = dict


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4))
def new_state(c: ModelConfig, params: dict, slots: int, length: int, kv_dtype: str) -> State:
    """All slots empty; each has room for `length` tokens."""

    def zeros(shape, dtype):
        return jnp.zeros(shape, dtype, out_sharding=spec("batch", *[None] * (len(shape) - 1)))

    settings = sampling.row_settings([])
    return kv.empty(c, params, slots, length, kv_dtype) | {
        "tokens_b": zeros((slots,), jnp.int32),
        "index_b": zeros((slots,), jnp.int32),
        "seen_bv": zeros((slots, c.vocab_size), bool),
        "settings": {name: zeros((slots,), value.dtype) for name, value in settings.items()},
    }


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def prefill(
    c: ModelConfig, params: dict, state: State, rows: dict, is_fresh: bool
) -> tuple[jax.Array, State]:
    """Puts parts of prompts into their slots; returns each row's next token [R].

    Args:
      rows: `batch` [R, T]; `slot_r`, `start_r`, `end_rt` and `is_fresh` as in `Neo.prefill`;
        `is_last_r`, whether the prompt ends in this row, so that generation starts; then `seen_rv`
        and `settings` of the request.
    """
    neo, slot_r = bind(c, params), rows["slot_r"]
    logits_rv, state = neo.prefill(rows["batch"], state, rows, is_fresh)
    first_r = jnp.zeros_like(slot_r)
    tokens_r = sampling.sample(logits_rv, rows["seen_rv"], rows["settings"], first_r)
    seen_rv = sampling.add_seen(rows["seen_rv"], tokens_r)
    new = {"tokens_b": tokens_r, "index_b": first_r + 1, "seen_bv": seen_rv}
    new |= {"settings": rows["settings"]}
    old = {name: state[name] for name in new}
    state |= jax.tree.map(lambda o, n: kv.put_rows(o, n, slot_r, rows["is_last_r"]), old, new)
    return tokens_r, state


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    c: ModelConfig, params: dict, state: State, is_active_b: jax.Array
) -> tuple[jax.Array, State]:
    """One step of all slots; returns each active slot's next token [B]."""
    logits_bv, state = bind(c, params).decode(state["tokens_b"], state, is_active_b)
    tokens_b = sampling.sample(logits_bv, state["seen_bv"], state["settings"], state["index_b"])
    tokens_b = jnp.where(is_active_b, tokens_b, state["tokens_b"])
    seen_bv = sampling.add_seen(state["seen_bv"], tokens_b)
    index_b = state["index_b"] + is_active_b
    return tokens_b, state | {"tokens_b": tokens_b, "index_b": index_b, "seen_bv": seen_bv}


@functools.partial(jax.jit, donate_argnums=0)
def copy_slot(state: State, from_d: jax.Array, to_d: jax.Array) -> State:
    """Copies one slot's keys and values to another, on each device of the batch axes its own."""
    return kv.copy_slot(state, from_d, to_d)
