"""The device's side of generation: jitted programs over one state of fixed shape.

The state is a dict, donated to each program and given back. It has the pool of key-value blocks
(`model/kv_cache.py`), and per lane

    tokens_b        the last token, which the next step feeds
    index_b         how many tokens were generated
    length_b        position of the last token in its sequence: so many tokens are in the pool
    t_b             place of the last token on the T axis
    block_table_bn  the blocks of its sequence
    seen_bv         the tokens that are penalised
    settings        `sampling.row_settings`

Lanes and blocks are numbered on each device of the batch axes.
"""

import functools

import jax
import jax.numpy as jnp

from neo_jax.infer import sampling
from neo_jax.model import kv_cache as kv
from neo_jax.model.neo import bind
from neo_jax.model_config import ModelConfig
from neo_jax.sharding import AXES, batch_rows, spec

State = dict


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4, 5, 6))
def new_state(
    c: ModelConfig,
    params: dict,
    lanes: int,
    num_blocks: int,
    max_blocks: int,
    kv_dtype: str,
    block_size: int,
) -> State:
    """An empty pool and lanes that nobody has.

    Args:
      lanes: on each device of the batch axes.
      num_blocks: of the pool of each, the null block (0) among them.
      max_blocks: of one sequence.
      block_size: tokens of a block.
    """
    count = lanes * batch_rows(jax.sharding.get_abstract_mesh())

    def zeros(shape, dtype):
        return jnp.zeros(shape, dtype, out_sharding=spec("batch", *[None] * (len(shape) - 1)))

    settings = sampling.row_settings([])
    return {
        "pool": kv.empty(c, params, num_blocks, kv_dtype, block_size),
        "block_table_bn": zeros((count, max_blocks), jnp.int32),
        "seen_bv": zeros((count, c.vocab_size), bool),
        "settings": {name: zeros((count,), value.dtype) for name, value in settings.items()},
        **{name: zeros((count,), jnp.int32) for name in _COUNTERS},
    }


_COUNTERS = ("tokens_b", "index_b", "length_b", "t_b")


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(c: ModelConfig, params: dict, state: State, rows: dict) -> tuple[jax.Array, State]:
    """Puts chunks of sequences into their blocks; returns each row's next token [D * R].

    Args:
      rows: `batch`, and `block_r`, `start_r`, `first_key_r`, `end_dt`, `context_blocks_dc` as in
        `Neo.prefill`; and per row [D * R]
        is_last_r: the sequence's last known token is in this row, so its next one is sampled and
          its lane is set up for `decode`. The rest matters only where this is true.
        lane_r: the sequence's lane.
        index_r: how many of its tokens were generated before.
        block_table_rn: [D * R, max_blocks] the blocks of its sequence.
        settings: `sampling.row_settings` of the request.
    """
    lane_r, is_last_r = rows["lane_r"], rows["is_last_r"]
    logits_rv, pool = bind(c, params).prefill(rows["batch"], state["pool"], rows)
    seen_rv = _of_lanes(state["seen_bv"], lane_r)
    tokens_r = sampling.sample(logits_rv, seen_rv, rows["settings"], rows["index_r"])
    length_r, t_r = _after(rows["batch"], rows["start_r"])
    new = {
        "tokens_b": tokens_r,
        "index_b": rows["index_r"] + 1,
        "length_b": length_r,
        "t_b": t_r,
        "block_table_bn": rows["block_table_rn"],
        "seen_bv": sampling.add_seen(seen_rv, tokens_r),
        "settings": rows["settings"],
    }
    old = {name: state[name] for name in new}
    new = jax.tree.map(lambda o, n: kv.put_rows(o, n, lane_r, is_last_r), old, new)
    return tokens_r, state | new | {"pool": pool}


def _after(batch: dict, start_r: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Position and place on the T axis [D * R] of the token after each row's last one."""
    rows = start_r.shape[0]
    segments_rt, t_rt = (
        array_dt.reshape(rows, -1, out_sharding=spec("batch", None))
        for array_dt in (batch["segments"], batch["thw"][..., 0])
    )
    # T never falls along a sequence.
    t_r = jnp.max(jnp.where(segments_rt > 0, t_rt, 0), axis=1)
    return start_r + jnp.sum(segments_rt > 0, axis=1, dtype=jnp.int32), t_r + 1


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    c: ModelConfig, params: dict, state: State, block_b: jax.Array
) -> tuple[jax.Array, State]:
    """One step of all lanes; returns each active lane's next token [B].

    Args:
      block_b: [B] int32, the block that the lane's last token is written to: the one that its
        position is in. 0 (the null block): the lane is not active.
    """
    is_active_b, table_bn = block_b != kv.NULL_BLOCK, state["block_table_bn"]
    number_b = state["length_b"] // kv.block_size(state["pool"])
    is_here_bn = is_active_b[:, None] & (jnp.arange(table_bn.shape[1]) == number_b[:, None])
    table_bn = jnp.where(is_here_bn, block_b[:, None], table_bn)
    lanes = {name: state[name] for name in ("length_b", "t_b")}
    lanes |= {"is_active_b": is_active_b, "block_table_bn": table_bn}
    logits_bv, pool = bind(c, params).decode(state["tokens_b"], state["pool"], lanes)
    tokens_b = sampling.sample(logits_bv, state["seen_bv"], state["settings"], state["index_b"])
    tokens_b = jnp.where(is_active_b, tokens_b, state["tokens_b"])
    new = {name: state[name] + is_active_b for name in ("index_b", "length_b", "t_b")}
    seen_bv = sampling.add_seen(state["seen_bv"], jnp.where(is_active_b, tokens_b, -1))
    new |= {"tokens_b": tokens_b, "block_table_bn": table_bn, "seen_bv": seen_bv, "pool": pool}
    return tokens_b, state | new


@functools.partial(jax.jit, donate_argnums=0)
def set_seen(state: State, device: jax.Array, lane: jax.Array, ids: jax.Array) -> State:
    """Sets which tokens a lane's request has penalised before any more is generated.

    For a request with a penalty, before the prefill that samples its next token: a lane keeps what
    the request before it has seen.

    Args:
      device, lane: scalars.
      ids: [n] token ids, in any order; fill up with the size of the vocabulary.
    """

    def put(seen_bv, device, lane, ids):
        is_here = jax.lax.axis_index(AXES["batch"]) == device
        row = jnp.zeros_like(seen_bv[0]).at[ids].set(True, mode="drop")
        row = jnp.where(is_here, row, seen_bv[lane])
        return jax.lax.dynamic_update_index_in_dim(seen_bv, row, lane, axis=0)

    of_seen = spec("batch", None)
    put = jax.shard_map(
        put, in_specs=(of_seen, spec(), spec(), spec()), out_specs=of_seen, check_vma=False
    )
    return state | {"seen_bv": put(state["seen_bv"], device, lane, ids)}


def _of_lanes(array_bv: jax.Array, lane_r: jax.Array) -> jax.Array:
    """[R, V]: the rows of some lanes [B, V]."""

    def take(array_bv, lane_r):
        return array_bv[lane_r]

    of_rows = spec("batch", None)
    return jax.shard_map(
        take, in_specs=(of_rows, spec("batch")), out_specs=of_rows, check_vma=False
    )(array_bv, lane_r)
