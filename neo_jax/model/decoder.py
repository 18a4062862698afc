"""The decoder's blocks and how a stack of them runs: one scan, optionally rematerialised.

Pre-Buffer and post-LLM are two stacks of the same block; they see the same mask and differ in
origin and in what a training stage trains.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from neo_jax.config import ModelConfig
from neo_jax.model import layers
from neo_jax.model.attention import Attend, Attention, Rotary
from neo_jax.model.int8 import Int8Matrix
from neo_jax.sharding import spec

# What the backward pass keeps of a block beside its input, least first; with "none" everything.
# Heads before their norms, not after: the norms' own backward pass asks for those.
KEPT = {
    "full": (),
    "attention": ("attended", "log_sum"),
    "projections": ("attended", "log_sum", "projected"),
    "gate": ("attended", "log_sum", "gate"),
    "mlp": ("attended", "log_sum", "gate", "up"),
    "products": ("attended", "log_sum", "projected", "gate", "up"),
}
REMAT_POLICIES = (*KEPT, "none")


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

    def __call__(self, x_btd: jax.Array, rotary: Rotary, attend: Attend) -> tuple[jax.Array, Any]:
        eps = self.cfg.rms_norm_eps
        with jax.named_scope("attention"):
            y_btd = layers.rms_norm(x_btd, self.attention_norm, eps)
            y_btd, carried = self.attention(y_btd, rotary, attend)
        x_btd = layers.in_order(x_btd + y_btd)
        with jax.named_scope("mlp"):
            x_btd = x_btd + self.mlp(layers.rms_norm(x_btd, self.mlp_norm, eps))
        return layers.in_order(x_btd), carried


def stack(c: ModelConfig, rngs: nnx.Rngs, size: int) -> Block:
    """`size` blocks as one whose parameters have a leading layer axis."""
    keys = jax.random.split(rngs.params(), size)
    return jax.vmap(lambda key: Block(c, rngs=nnx.Rngs(key)))(keys)


def run(
    blocks: Block, x_btd: jax.Array, body: Callable, carry: Any = None, remat: str = "none"
) -> tuple[jax.Array, Any, Any]:
    """Scans `body` over a stack.

    Args:
      blocks: from `stack`.
      x_btd: [B, T, D].
      body: (block, layer, x_btd, carry) -> x_btd, carry, output.
      carry: what blocks hand on besides x, such as a cache that is written in place.
      remat: a name in REMAT_POLICIES.

    Arrays of `blocks` and `carry` may be `Apart`, all or none. Then a layer's `body` gets its own
    part of the carry, and 0 for its number in there.

    Returns:
      x_btd, the last carry, and the outputs stacked on a leading layer axis.
    """
    if isinstance(blocks.mlp_norm[...], Apart):
        return _run_apart(blocks, x_btd, body, carry)

    def step(state, block_and_layer):
        x_btd, carry, output = body(*block_and_layer, *state)
        return (x_btd, carry), output

    if remat != "none":
        policy = jax.checkpoint_policies.save_only_these_names(*KEPT[remat])
        step = jax.checkpoint(step, policy=policy, prevent_cse=False)
    layer_index = jax.numpy.arange(blocks.mlp_norm.shape[0])
    (x_btd, carry), outputs = jax.lax.scan(step, (x_btd, carry), (blocks, layer_index))
    return x_btd, carry, outputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Apart:
    """A stack of layers as one array each.

    A CPU computes with an array where it lies, but first copies a layer out of a stack, which takes
    longer than a decoded token's products with it.
    """

    layers: tuple[Any, ...]

    def __getitem__(self, index) -> Any:
        return self if index is Ellipsis else self.layers[index]


def apart(stack: Any) -> Any:
    """The same tree with each array's layers `Apart`. On one CPU device nothing is copied."""

    def split(array):
        parts = np.asarray(array)
        sharding = NamedSharding(array.sharding.mesh, P(*array.sharding.spec[1:]))
        return [jax.device_put(part, sharding) for part in parts]

    def convert(leaf):
        leaves, structure = jax.tree.flatten(leaf)
        return Apart(tuple(map(structure.unflatten, zip(*map(split, leaves), strict=True))))

    return jax.tree.map(convert, stack, is_leaf=lambda leaf: isinstance(leaf, Int8Matrix))


def _run_apart(blocks: Block, x_btd: jax.Array, body: Callable, carry: Any):
    def is_apart(leaf):
        return isinstance(leaf, Apart)

    carries, outputs = [], []
    for number in range(len(blocks.mlp_norm[...].layers)):
        block, own = (
            jax.tree.map(lambda leaf: leaf.layers[number], tree, is_leaf=is_apart)  # noqa: B023
            for tree in (blocks, carry)
        )
        x_btd, own, output = body(block, 0, x_btd, own)
        carries.append(own)
        outputs.append(output)
    together = jax.tree.map(lambda *layers: Apart(layers), *carries)
    return x_btd, together, jax.tree.map(lambda *layers: jax.numpy.stack(layers), *outputs)
