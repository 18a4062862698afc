"""THW attention: the channels of a head are divided among the three position axes.

A query or key head has J channels: T channels from `q_t`, H and W channels from `q_hw`. Each axis
has its own rotation, and its own norm. Channels are ordered in halves, and a rotation acts on
channel i of both:

    [T1 H1 W1 | T2 H2 W2]

So the three rotations are one, and the three norms one product with a block-diagonal matrix.

    qk_layout               T channels      H and W channels    norms
    expanded                head_dim        head_dim            T, H, W
    expanded_merged_norm    head_dim        head_dim            T, H and W together
    fused                   head_dim / 2    head_dim / 2        T, H and W together
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from neo_jax.kernels.norm_rope import norm_rope
from neo_jax.kernels.softmax_base import LN_2
from neo_jax.model import layers
from neo_jax.model_config import ModelConfig
from neo_jax.sharding import spec

Rotary = tuple[jax.Array, jax.Array]  # cos and sin, from rope.py
# q [B, T, N, J], k [B, T, K, J], v [B, T, K, H] -> the attention output [B, T, N, H], and the cache
# with these keys and values (None without a cache). The softmax is of LN_2 q k.
AttentionFn = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Attention(nnx.Module):
    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = c
        d, n, k, h = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        t, hw = c.t_width, c.hw_width
        heads = ("embed", "heads", None)
        self.q_t_dnh = layers.matrix(rngs, (d, n, t), *heads)
        self.q_hw_dnh = layers.matrix(rngs, (d, n, hw), *heads)
        self.k_t_dkh = layers.matrix(rngs, (d, k, t), *heads)
        self.k_hw_dkh = layers.matrix(rngs, (d, k, hw), *heads)
        self.v_dkh = layers.matrix(rngs, (d, k, h), *heads)
        self.o_nhd = layers.matrix(rngs, (n, h, d), "heads", None, "embed")
        self.q_norm_t, self.k_norm_t = layers.ones(t), layers.ones(t)
        if c.qk_layout == "expanded":
            self.q_norm_h, self.q_norm_w = layers.ones(hw // 2), layers.ones(hw // 2)
            self.k_norm_h, self.k_norm_w = layers.ones(hw // 2), layers.ones(hw // 2)
        else:
            self.q_norm_hw, self.k_norm_hw = layers.ones(hw), layers.ones(hw)

    def __call__(
        self, x_btd: jax.Array, rotary: Rotary, attention_fn: AttentionFn
    ) -> tuple[jax.Array, Any]:
        """[B, T, D] -> [B, T, D], and the cache that `attention_fn` returns."""
        z_btnh, cache = attention_fn(*self.qkv(x_btd, rotary))
        b, t, n, h = z_btnh.shape
        z_bti = z_btnh.reshape(b, t, n * h, out_sharding=spec("batch", None, "heads"))
        o_id = _merge_head_dims(layers.all_gather_params(self.o_nhd, z_btnh.dtype), 0)
        y_btd = layers.einsum("bti,id->btd", z_bti, o_id, out=spec("batch", None, None))
        return y_btd, cache

    def qkv(self, x_btd: jax.Array, rotary: Rotary) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Normed and rotated queries [B, T, N, J] and keys [B, T, K, J]; values [B, T, K, H]."""
        with jax.named_scope("qkv"):
            q = _project(x_btd, self.q_t_dnh, self.q_hw_dnh)
            k = _project(x_btd, self.k_t_dkh, self.k_hw_dkh)
            (v_btkh,) = _project(x_btd, self.v_dkh)
        with jax.named_scope("norm_rope"):
            shared = *rotary, _norm_groups(self.cfg), self.cfg.rms_norm_eps
            q_btnj = norm_rope(*q, self._norm_scale("q"), *shared)
            k_btkj = norm_rope(*k, self._norm_scale("k"), *shared)
        return q_btnj, k_btkj, v_btkh

    def _norm_scale(self, which: str) -> jax.Array:
        """[J] scale of the norms of queries or keys ("q" or "k"), in the heads' channel order.

        That of queries includes the scale of the softmax, 1 / sqrt(head_dim), and its change of
        base (`softmax_base.py`), so that scores need no multiplication of their own.
        """
        if self.cfg.qk_layout == "expanded":
            h, w = getattr(self, which + "_norm_h"), getattr(self, which + "_norm_w")
            hw = join_halves(h[...], w[...])
        else:
            hw = getattr(self, which + "_norm_hw")[...]
        t = getattr(self, which + "_norm_t")[...]
        scale_j = join_halves(t, hw).astype(jnp.float32)
        return scale_j * (self.cfg.head_dim**-0.5 / LN_2) if which == "q" else scale_j


def _merge_head_dims(weight: Any, first: int) -> Any:
    """A gathered weight with the dimensions of heads and their channels merged into one.

    A product then has the layout that the next kernel takes. With two dimensions, XLA:CPU would
    also transpose the weight for every decoded token.
    """

    def merge(part):
        if part.ndim == 2:  # the factor of a `LoraMatrix` that has no heads
            return part
        shape, axes = part.shape, jax.typeof(part).sharding.spec
        out = P(*axes[: first + 1], *axes[first + 2 :])
        return part.reshape(*shape[:first], -1, *shape[first + 2 :], out_sharding=out)

    return jax.tree.map(merge, weight)


def join_halves(a: jax.Array, b: jax.Array) -> jax.Array:
    """[A1 A2], [B1 B2] -> [A1 B1 A2 B2] on the last axis."""
    (a1, a2), (b1, b2) = jnp.split(a, 2, axis=-1), jnp.split(b, 2, axis=-1)
    return jnp.concatenate([a1, b1, a2, b2], axis=-1)


def _project(x_btd: jax.Array, *weights: nnx.Param) -> list[jax.Array]:
    """The products [B, T, N, width] of x with each weight."""
    b, t, d = x_btd.shape
    if b * t <= d:
        products = [layers.einsum("btd,dnh->btnh", x_btd, weight) for weight in weights]
        products = [checkpoint_name(product, "projected") for product in products]
        # Else XLA:CPU computes the products again for each half of a head.
        return jax.lax.optimization_barrier(products)
    outputs = []
    for weight in weights:
        weight_dnh = layers.all_gather_params(weight, x_btd.dtype)
        y_bti = layers.einsum("btd,di->bti", x_btd, _merge_head_dims(weight_dnh, 1))
        y_bti = checkpoint_name(y_bti, "projected")
        batch, time, heads = jax.typeof(y_bti).sharding.spec
        shape = (b, t, *weight_dnh.shape[1:])
        outputs.append(y_bti.reshape(shape, out_sharding=P(batch, time, heads, None)))
    return outputs


def _norm_groups(c: ModelConfig) -> tuple[int, ...]:
    """Widths of the channels in half a head that share a norm."""
    t, hw = c.t_width // 2, c.hw_width // 2
    return (t, hw // 2, hw // 2) if c.qk_layout == "expanded" else (t, hw)
