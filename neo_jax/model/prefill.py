"""Attention while chunks of prompts are put into the pool, in rows of a block's number of tokens.

All chunks of a program lie side by side in one row of tokens on each device, each on a block's
boundary, and every query sees one interval of keys. So several short prompts, or a chunk of a long
one, fill the same few shapes.

    tokens        a a a a | a a . . | b b b b | b . . .    two chunks in rows of 4; . is padding
    chunks that begin prompts see their own tokens:                    a[0, t]       b[8, 8 + t]
    chunks that go on see their blocks, side by side:    A A A A A A B B B B B   a[0, t] b[24, 24+t]
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from neo_jax.kernels.flash import BlockLists
from neo_jax.kernels.interval_attention import interval_attention, make_block_lists
from neo_jax.model import kv_cache as kv
from neo_jax.sharding import AXES, spec


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Where the tokens of a prefill belong and what they see.

    Attributes:
      block_r: [R] the block that a row is written to, counted on each device.
      first_r: [R] places of that block before this one keep what they have.
      count_r: [R] tokens of the row, from there on.
      blocks_dc: [D, C] the blocks whose tokens are seen, side by side; C is 0 if the keys are
        the tokens of this prefill.
      start_dt, end_dt: [D, T] the interval of keys that a token sees.
      block_lists: of the intervals, shared by all layers.
    """

    block_r: jax.Array
    first_r: jax.Array
    count_r: jax.Array
    blocks_dc: jax.Array
    start_dt: jax.Array
    end_dt: jax.Array
    block_lists: BlockLists | None

    @classmethod
    def of(cls, batch, where: Mapping[str, jax.Array], size: int, widths, itemsize: int):
        """From the arguments of `Neo.prefill`; `size`: tokens of a row."""
        is_token_dt = batch["segments"] > 0
        rows = where["block_r"].shape[0]
        is_token_rt = is_token_dt.reshape(rows, size, out_sharding=spec("batch", None))
        start_rt = jnp.broadcast_to(where["first_key_r"][:, None], (rows, size))
        start_dt = start_rt.reshape(is_token_dt.shape, out_sharding=spec("batch", None))
        end_dt = start_dt + jnp.where(is_token_dt, where["end_dt"], 0)
        blocks_dc = where["context_blocks_dc"]
        num_keys = blocks_dc.shape[1] * size or is_token_dt.shape[1]
        return cls(
            block_r=where["block_r"],
            first_r=where["start_r"] % size,
            count_r=jnp.sum(is_token_rt, axis=1, dtype=jnp.int32),
            blocks_dc=blocks_dc,
            start_dt=start_dt,
            end_dt=end_dt,
            block_lists=make_block_lists(start_dt, end_dt, num_keys, widths, itemsize),
        )

    def last_tokens(self, array_dt: jax.Array) -> jax.Array:
        """[R, 1, ...]: of [D, T, ...], what each row's last token has."""
        rows, rest = self.block_r.shape[0], array_dt.shape[2:]
        names = spec("batch", None, *[None] * len(rest))
        array_rt = array_dt.reshape(rows, -1, *rest, out_sharding=names)
        last_r = jnp.maximum(self.first_r + self.count_r - 1, 0)
        return jax.vmap(lambda row, index: row[index])(array_rt, last_r)[:, None]


def attend(
    q_dtnj: jax.Array,
    k_dtkj: jax.Array,
    v_dtkh: jax.Array,
    store: dict[str, kv.Store],
    layer: jax.Array,
    chunks: Chunks,
    num_key_heads: int,
    scale: float,
) -> jax.Array:
    """Attention of a layer's new tokens, whose keys and values are in the store. [D, T, N, H]."""
    if chunks.blocks_dc.shape[1]:
        k_dtkj, v_dtkh = (
            _gathered(store[which], layer, chunks.blocks_dc, num_key_heads, q_dtnj.dtype)
            for which in ("k", "v")
        )
    bounds = chunks.start_dt, chunks.end_dt
    return interval_attention(q_dtnj, k_dtkj, v_dtkh, *bounds, scale, chunks.block_lists)


def _gathered(store: kv.Store, layer, blocks_dc, num_key_heads: int, dtype) -> jax.Array:
    """[D, C * block_size, K, width]: each device's blocks of one layer."""

    def local(store, layer, blocks_dc):
        return kv.gather_blocks(store, layer, blocks_dc[0], num_heads, dtype)

    num_heads = num_key_heads // jax.sharding.get_abstract_mesh().shape[AXES["heads"]]
    in_specs = (kv.partition(store), spec(), spec("batch", None))
    out_specs = spec("batch", None, "heads", None)
    run = jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return run(store, jnp.asarray(layer), blocks_dc)
