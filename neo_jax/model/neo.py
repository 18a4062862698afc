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
from neo_jax.model.prefill import attend_rows, attend_slots
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
        self, batch: Batch, cache: kv.Cache, where: Mapping[str, jax.Array], is_fresh: bool
    ) -> tuple[jax.Array, kv.Cache]:
        """Writes rows of prompt tokens into slots of the cache.

        Args:
          batch: [R, T] a part of one prompt per row; `thw` as in the prompt. The rows of a prompt
            follow one another, all but its last are full, and none splits an image. A row of
            padding changes nothing.
          cache: of B slots.
          where: `slot_r` [R], the row's slot, numbered on each device of the batch axes; `start_r`
            [R], the position in its prompt of the row's first token; `end_rt` [R, T], the position
            up to which the token sees its prompt.
          is_fresh: all prompts start in these rows, so the cache need not be read.

        Returns:
          logits [R, V] after each row's last token, and the cache.
        """
        c = self.cfg
        slot_r, start_r, end_rt = (where[name] for name in ("slot_r", "start_r", "end_rt"))
        count_r = jnp.sum(batch["segments"] > 0, axis=1, dtype=jnp.int32)
        rotary = thw_rotary(batch["thw"], c.t_width, c.hw_width, c.rope_theta, c.rope_theta_hw)

        def body(block, layer, x_rtd, store):
            def attend(q_rtnj, k_rtkj, v_rtkh):
                grown = {
                    which: kv.write_chunk(store[which], new, layer, slot_r, start_r, count_r)
                    for which, new in (("k", k_rtkj), ("v", v_rtkh))
                }
                if is_fresh:
                    return attend_rows(q_rtnj, k_rtkj, v_rtkh, start_r, end_rt, LN_2), grown
                return attend_slots(
                    q_rtnj, grown, layer, slot_r, end_rt, c.num_key_value_heads, LN_2
                ), grown

            x_rtd, store = block(x_rtd, rotary, attend)
            return x_rtd, store, None

        x_rtd, cache = self._through_cache(self.inputs(batch), cache, body)
        last_r = jnp.maximum(count_r - 1, 0)
        x_r1d = jax.vmap(lambda row, index: row[index])(x_rtd, last_r)[:, None]
        t_r = jax.vmap(lambda row, index: row[index])(batch["thw"][..., 0], last_r)
        for name, value_r in (("length_b", start_r + count_r), ("t_b", t_r + 1)):
            cache[name] = kv.put_rows(cache[name], value_r, slot_r, count_r > 0)
        return self.logits(self.normed(x_r1d))[:, 0], cache

    def decode(
        self, tokens_b: jax.Array, cache: kv.Cache, is_active_b: jax.Array
    ) -> tuple[jax.Array, kv.Cache]:
        """One token per row: ids [B] -> logits [B, V] of the next token, and the updated cache.

        Rows that are not active keep their length; their logits mean nothing.
        """
        c, zero_b1 = self.cfg, 0 * cache["length_b"][:, None]
        # Inactive rows write to the last place. No row uses it: an answer's last token is not fed.
        place_b = jnp.where(is_active_b, cache["length_b"], kv.length(cache) - 1)
        thw_b13 = jnp.stack([cache["t_b"][:, None], zero_b1, zero_b1], axis=-1)
        rotary = thw_rotary(thw_b13, c.t_width, c.hw_width, c.rope_theta, c.rope_theta_hw)

        def body(block, layer, x_b1d, store):
            def attend(q_b1nj, k_b1kj, v_b1kh):
                grown = {
                    which: kv.write_token(store[which], new, layer, place_b)
                    for which, new in (("k", k_b1kj), ("v", v_b1kh))
                }
                end_b, heads = cache["length_b"] + 1, c.num_key_value_heads
                z_b1nh = decode_attention(q_b1nj, grown["k"], grown["v"], layer, end_b, heads, LN_2)
                return z_b1nh, grown

            x_b1d, store = block(x_b1d, rotary, attend)
            return x_b1d, store, None

        x_b1d, cache = self._through_cache(self._lookup(tokens_b[:, None]), cache, body)
        for name in ("length_b", "t_b"):
            cache[name] = cache[name] + is_active_b
        return self.logits(self.normed(x_b1d))[:, 0], cache

    def _through_cache(self, x_btd: jax.Array, cache: kv.Cache, body) -> tuple[jax.Array, kv.Cache]:
        """Runs all layers with the cache as the loop's carry, so that it is written in place."""
        cache = dict(cache)
        for name, blocks in self._stacks():
            x_btd, cache[name], _ = decoder.run_stack(blocks, x_btd, body, cache[name])
        return x_btd, cache

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
