"""The decoder's blocks, and stacks of them with a remat policy.

Pre-Buffer and post-LLM are two stacks of the same block, with the same mask. They differ in where
their weights come from, and in which of them a training stage trains.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from neo_jax.model import layer_stack, layers
from neo_jax.model.attention import Attention, AttentionFn, Rotary
from neo_jax.model_config import ModelConfig
from neo_jax.sharding import spec

# Remat policies: the activations of a block that are saved for the backward pass, beside its input.
# Least memory first; with "none" all are saved. "projected" is q, k and v before their norms, which
# the backward pass of the norms needs.
SAVED_NAMES = {
    "full": (),
    "attention": ("attn_out", "log_sum"),
    "projections": ("attn_out", "log_sum", "projected"),
    "gate": ("attn_out", "log_sum", "gate"),
    "mlp": ("attn_out", "log_sum", "gate", "up"),
    "products": ("attn_out", "log_sum", "projected", "gate", "up"),
}
REMAT_POLICIES = (*SAVED_NAMES, "none")


class Mlp(nnx.Module):
    """SwiGLU."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        d, f = c.hidden_size, c.intermediate_size
        self.gate_df = layers.matrix(rngs, (d, f), "embed", "ffw")
        self.up_df = layers.matrix(rngs, (d, f), "embed", "ffw")
        self.down_fd = layers.matrix(rngs, (f, d), "ffw", "embed")

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        gate_btf = layers.einsum("btd,df->btf", x_btd, self.gate_df)
        up_btf = layers.einsum("btd,df->btf", x_btd, self.up_df)
        gate_btf, up_btf = checkpoint_name(gate_btf, "gate"), checkpoint_name(up_btf, "up")
        y_btf = jax.nn.silu(gate_btf) * up_btf
        return layers.einsum("btf,fd->btd", y_btf, self.down_fd, out=spec("batch", None, None))


class Block(nnx.Module):
    """Pre-norm residual block, as in Qwen3."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = c
        self.attention_norm = layers.ones(c.hidden_size)
        self.attention = Attention(c, rngs=rngs)
        self.mlp_norm = layers.ones(c.hidden_size)
        self.mlp = Mlp(c, rngs=rngs)

    def __call__(
        self, x_btd: jax.Array, rotary: Rotary, attention_fn: AttentionFn
    ) -> tuple[jax.Array, Any]:
        """[B, T, D] -> [B, T, D], and the cache that `attention_fn` returns."""
        eps = self.cfg.rms_norm_eps
        with jax.named_scope("attention"):
            y_btd = layers.rms_norm(x_btd, self.attention_norm, eps)
            y_btd, cache = self.attention(y_btd, rotary, attention_fn)
        x_btd = layers.row_major(x_btd + y_btd)
        with jax.named_scope("mlp"):
            x_btd = x_btd + self.mlp(layers.rms_norm(x_btd, self.mlp_norm, eps))
        return layers.row_major(x_btd), cache


def make_stack(c: ModelConfig, rngs: nnx.Rngs, num_layers: int) -> Block:
    """A stack of blocks: one `Block` whose parameters have a leading layer axis."""
    keys = jax.random.split(rngs.params(), num_layers)
    return jax.vmap(lambda key: Block(c, rngs=nnx.Rngs(key)))(keys)


def run_stack(
    blocks: Block, x_btd: jax.Array, body: Callable, carry: Any = None, remat: str = "none"
) -> tuple[jax.Array, Any, Any]:
    """Runs `body` for each block of a stack, under a remat policy; see `layer_stack.run_layers`.

    Args:
      blocks: from `make_stack`.
      x_btd: [B, T, D].
      body: (block, layer index, x_btd, carry) -> x_btd, carry, output.
      carry: what else the blocks hand on, such as a cache that is written in place.
      remat: a name in REMAT_POLICIES.

    Returns:
      x_btd, the last carry, and the outputs stacked on a leading layer axis.
    """

    def checkpoint(step: Callable) -> Callable:
        policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES[remat])
        return jax.checkpoint(step, policy=policy, prevent_cse=False)

    wrap = {} if remat == "none" else {"wrap": checkpoint}
    return layer_stack.run_layers(blocks, x_btd, body, carry, **wrap)
