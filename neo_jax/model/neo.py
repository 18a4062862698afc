"""The model: a batch to logits, and prefill and decode.

`init_params` makes a plain nested dict. `bind` puts it back into modules, inside jit only. So
optimizers, checkpoints and the converter need not know Flax.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from neo_jax.batch import Batch
from neo_jax.collectives import all_gather_sequence, local_sequence
from neo_jax.errors import InputError
from neo_jax.kernels.decode_attention import decode_attention
from neo_jax.kernels.interval_attention import interval_attention, make_block_lists
from neo_jax.kernels.intervals import intervals
from neo_jax.kernels.softmax_base import LN_2
from neo_jax.model import decoder, layers
from neo_jax.model import kv_cache as kv
from neo_jax.model.patch_embed import PatchEmbed
from neo_jax.model.prefill import Chunks
from neo_jax.model.prefill import attend as attend_chunks
from neo_jax.model.rope import thw_rotary
from neo_jax.model_config import ModelConfig
from neo_jax.sharding import AXES, describe, make_mesh, spec


class Neo(nnx.Module):
    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = c
        self.patch_embed = PatchEmbed(c, rngs=rngs)
        self.embed = layers.matrix(rngs, (c.vocab_size, c.hidden_size), "vocab", "embed")
        if c.num_pre_buffer_layers:
            self.pre_buffer = decoder.make_stack(c, rngs, c.num_pre_buffer_layers)
        self.post_llm = decoder.make_stack(c, rngs, c.num_post_llm_layers)
        self.final_norm = layers.ones(c.hidden_size)
        if not c.tie_word_embeddings:
            self.lm_head = layers.matrix(rngs, (c.vocab_size, c.hidden_size), "vocab", "embed")

    def __call__(self, batch: Batch, remat: str = "none") -> jax.Array:
        """Logits [B, L, V] float32 of every token of a batch (`batch.py`)."""
        return self.logits(self.features(batch, remat))

    def features(self, batch: Batch, remat: str = "none", attention: str = "auto") -> jax.Array:
        """The final hidden states [B, L, D], normed: the input of the head.

        Args:
          remat: one of decoder.REMAT_POLICIES.
          attention: one of interval_attention.IMPLEMENTATIONS.
        """
        x_btd, _ = self.run_layers(batch, lambda x_btd: None, remat, attention)
        return self.normed(x_btd)

    def hidden_states(self, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Input embeddings [B, L, D], residual stream after each layer [l, B, L, D], final norm."""
        x_btd, outputs = self.run_layers(batch, lambda x_btd: x_btd)
        layers_lbtd = jnp.concatenate(list(outputs.values()))
        return self.inputs(batch), layers_lbtd, self.normed(x_btd)

    def prefill(
        self, batch: Batch, pool: kv.Pool, where: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, kv.Pool]:
        """Prefill: writes chunks of sequences into blocks of the pool.

        A device of the batch axes has one row of T = R * block_size tokens, which holds the chunks
        side by side: R rows of `block_size` tokens, each for one block of the pool. A chunk takes
        as many rows as it touches blocks. Its first row has padding in front if the chunk begins
        within a block, and its last row behind. A chunk does not end within an image.

        Args:
          batch: [D, T] as in `batch.py`; segments 0 at padding and else 1, `thw` as in the
            sequence. A device's patches follow one another over all its chunks.
          pool: `kv_cache.empty`.
          where: numbered on each device,
            block_r [D * R]: block that a row is written to; the null block for a row of padding.
            start_r [D * R]: position in its sequence of the row's first token; the row's tokens
              lie from `start_r % block_size` on.
            end_dt [D, T]: up to which position of its sequence a token sees.
            context_blocks_dc [D, C]: C = 0 if all chunks begin their sequences: their keys are the
              tokens of the batch. Else all blocks of the chunks' sequences, up to the chunks' ends,
              side by side: those are the keys.
            first_key_r [D * R]: where among the keys the row's sequence begins: `block_size` times
              the number of its first row, or of its first block in `context_blocks_dc`.

        Returns:
          logits [D * R, V] after each row's last token, and the pool.
        """
        c = self.cfg
        widths, itemsize = (c.qk_width, c.head_dim), jnp.dtype(c.dtype).itemsize
        chunks = Chunks.of(batch, where, kv.block_size(pool), widths, itemsize)
        rotary = thw_rotary(batch["thw"], c.t_width, c.hw_width, c.rope_theta, c.rope_theta_hw)

        def body(block, layer, x_dtd, store):
            def attend(q_dtnj, k_dtkj, v_dtkh):
                new = {"k": k_dtkj, "v": v_dtkh}
                grown = kv.write_rows(store, new, layer, chunks.block_r, chunks.first_r)
                arrays, heads = (q_dtnj, k_dtkj, v_dtkh), c.num_key_value_heads
                return attend_chunks(*arrays, grown, layer, chunks, heads, LN_2), grown

            x_dtd, store = block(x_dtd, rotary, attend)
            return x_dtd, store, None

        x_dtd, pool = self._through_pool(self.inputs(batch), pool, body)
        return self.logits(self.normed(chunks.last_tokens(x_dtd)))[:, 0], pool

    def decode(
        self, tokens_b: jax.Array, pool: kv.Pool, lanes: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, kv.Pool]:
        """One more token per lane: [B] ids -> logits [B, V] and the pool with it written.

        Args:
          lanes: is_active_b [B] bool: the others write to the null block, and what they return
              means nothing.
            length_b [B]: tokens before this one, so its position in its sequence.
            t_b [B]: its place on the T axis.
            block_table_bn [B, n]: the blocks of the lane's sequence, numbered on each device.
        """
        c, size, is_active_b = self.cfg, kv.block_size(pool), lanes["is_active_b"]
        t_b1 = lanes["t_b"][:, None]
        rotary = thw_rotary(
            jnp.stack([t_b1, 0 * t_b1, 0 * t_b1], axis=-1),
            c.t_width,
            c.hw_width,
            c.rope_theta,
            c.rope_theta_hw,
        )
        table_bn, position_b = lanes["block_table_bn"], jnp.where(is_active_b, lanes["length_b"], 0)
        block_b = jax.vmap(lambda row, index: row[index])(table_bn, position_b // size)
        block_b = jnp.where(is_active_b, block_b, kv.NULL_BLOCK)
        end_b = jnp.where(is_active_b, position_b + 1, 0)

        def body(block, layer, x_b1d, store):
            def attend(q_b1nj, k_b1kj, v_b1kh):
                new = {"k": k_b1kj, "v": v_b1kh}
                grown = kv.write_token(store, new, layer, block_b, position_b % size)
                stores, heads = (grown["k"], grown["v"]), c.num_key_value_heads
                z_b1nh = decode_attention(q_b1nj, *stores, layer, table_bn, end_b, heads, LN_2)
                return z_b1nh, grown

            x_b1d, store = block(x_b1d, rotary, attend)
            return x_b1d, store, None

        x_b1d, pool = self._through_pool(self._lookup(tokens_b[:, None]), pool, body)
        return self.logits(self.normed(x_b1d))[:, 0], pool

    def _through_pool(self, x_btd: jax.Array, pool: kv.Pool, body) -> tuple[jax.Array, kv.Pool]:
        """Runs all layers with the pool as their carry, so that it is written in place."""
        pool = dict(pool)
        for name, blocks in self._stacks():
            x_btd, pool[name], _ = decoder.run_stack(blocks, x_btd, body, pool[name])
        return x_btd, pool

    def run_layers(
        self, batch: Batch, output_fn: Callable, remat: str = "none", attention: str = "auto"
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Embeds a batch and runs all layers, without a cache.

        Args:
          output_fn: of a layer's output x [B, L, D].

        Returns:
          x [B, L, D] after the last layer, and what `output_fn` returned, per stack [l, ...].
        """
        c = self.cfg
        thw_bt3, segments_bt = batch["thw"], all_gather_sequence(batch["segments"])
        bounds = intervals(all_gather_sequence(thw_bt3[..., 0]), segments_bt)
        start_bt, end_bt = map(local_sequence, bounds)
        widths, itemsize = (c.qk_width, c.head_dim), jnp.dtype(c.dtype).itemsize
        block_lists = make_block_lists(start_bt, end_bt, segments_bt.shape[1], widths, itemsize)
        rotary = thw_rotary(thw_bt3, c.t_width, c.hw_width, c.rope_theta, c.rope_theta_hw)

        def attention_fn(q_btnj, k_btkj, v_btkh):
            keys, values = all_gather_sequence(k_btkj), all_gather_sequence(v_btkh)
            z_btnh = interval_attention(
                q_btnj, keys, values, start_bt, end_bt, LN_2, block_lists, attention
            )
            return z_btnh, None

        def body(block, layer, x_btd, carry):
            x_btd, _ = block(x_btd, rotary, attention_fn)
            return x_btd, carry, output_fn(x_btd)

        x_btd, outputs = self.inputs(batch), {}
        for name, blocks in self._stacks():
            x_btd, _, outputs[name] = decoder.run_stack(blocks, x_btd, body, remat=remat)
        return x_btd, outputs

    def inputs(self, batch: Batch) -> jax.Array:
        """The decoder's input [B, L, D]: embeddings, and visual tokens in place of image tokens."""
        x_btd = self._lookup(batch["tokens"])
        if batch["patches"].shape[1] == 0:
            return x_btd
        with jax.named_scope("patch_embed"):
            z_bmd = all_gather_sequence(self.patch_embed(batch["patches"], batch["patch_hw"]))
        index_bt = local_sequence(jnp.cumsum(all_gather_sequence(batch["is_image"]), axis=1)) - 1
        visual_btd = jax.vmap(lambda z_md, index_t: z_md.at[index_t].get(mode="clip"))(
            z_bmd, index_bt
        )
        return jnp.where(batch["is_image"][..., None], visual_btd, x_btd)

    def normed(self, x_btd: jax.Array) -> jax.Array:
        return layers.rms_norm(x_btd, self.final_norm, self.cfg.rms_norm_eps)

    def logits(self, y_btd: jax.Array) -> jax.Array:
        """[B, T, D] normed -> [B, T, V] float32."""
        return layers.einsum("btd,vd->btv", y_btd, self.head_vd, dtype="float32")

    @property
    def head_vd(self) -> nnx.Param:
        """[V, D]: the head, or the embedding if they are tied."""
        return self.embed if self.cfg.tie_word_embeddings else self.lm_head

    def _stacks(self) -> Iterator[tuple[str, decoder.Block]]:
        """The stacks in order; a model without a Pre-Buffer has one."""
        return ((name, getattr(self, name)) for name in kv.STACKS if hasattr(self, name))

    def _lookup(self, tokens_bt: jax.Array) -> jax.Array:
        """Embedding rows [B, T, D]: each device looks up its part of the vocabulary."""

        def local(table_vd, tokens_bt):
            first = jax.lax.axis_index(AXES["vocab"]) * table_vd.shape[0]
            row_bt = tokens_bt - first
            is_local = (row_bt >= 0) & (row_bt < table_vd.shape[0])
            rows_btd = layers.take_rows(table_vd, jnp.where(is_local, row_bt, 0), self.cfg.dtype)
            return jax.lax.psum(jnp.where(is_local[..., None], rows_btd, 0), AXES["vocab"])

        lookup = jax.shard_map(
            local,
            in_specs=(spec("vocab", None), spec("batch", None)),
            out_specs=spec("batch", None, None),
            check_vma=False,
        )
        return lookup(layers.all_gather_params(self.embed, self.cfg.dtype), tokens_bt)


def init_params(c: ModelConfig, key: jax.Array) -> dict:
    """Random parameters as a plain nested dict: also the layout of our checkpoints.

    Matrices are N(0, 0.02), norms 1, the patch embedding as PyTorch initialises convolutions. Call
    it inside jit under a mesh, so that every array is created sharded.
    """
    return nnx.to_pure_dict(nnx.state(Neo(c, rngs=nnx.Rngs(key))))


def bind(c: ModelConfig, params: dict) -> Neo:
    """The model with these parameters. For use inside jit."""
    return nnx.merge(_graphdef(c, jax.sharding.get_abstract_mesh()), params)


@functools.cache
def _graphdef(c: ModelConfig, mesh: AbstractMesh) -> nnx.GraphDef:
    # Modules name all axes of the mesh, also those that are manual in `shard_map_over_data`.
    kinds = (AxisType.Explicit,) * len(mesh.axis_names)
    mesh = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=kinds)
    with jax.sharding.use_abstract_mesh(mesh):
        return nnx.graphdef(jax.eval_shape(lambda: Neo(c, rngs=nnx.Rngs(0))))


def abstract_params(c: ModelConfig, mesh: Mesh | None = None, dtype: str = "float32") -> dict:
    """Shape, type and sharding of every parameter, without allocating any.

    Args:
      mesh: default: one device.

    Raises:
      InputError: if the mesh does not split every parameter evenly.
    """
    with jax.set_mesh(one_device := make_mesh((1, 1, 1))):
        shapes = jax.eval_shape(lambda: init_params(c, jax.random.key(0)))
    mesh, problems = one_device if mesh is None else mesh, []

    def place(path, leaf):
        sharding = NamedSharding(mesh, leaf.sharding.spec)
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError:
            name = "/".join(entry.key for entry in path)
            problems.append(f"{name} {leaf.shape} by {leaf.sharding.spec}")
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=sharding)

    params = jax.tree_util.tree_map_with_path(place, shapes)
    if problems:
        raise InputError(
            f"mesh {describe(mesh)} does not divide {len(problems)} parameters, such as "
            f"{problems[0]}: use sizes that divide {c.num_key_value_heads} key-value heads and "
            f"{c.vocab_size} ids (tensor), and a hidden size of {c.hidden_size} (fsdp, context)"
        )
    return params


def count_params(c: ModelConfig) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(c)))
