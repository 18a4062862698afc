"""Patch embedding: pixels to visual tokens.

    patch -> linear -> exact GELU -> rotary by row and column of the image -> linear of 2x2 patches

Both linear maps are convolutions whose stride equals their kernel size, so matrix products.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from neo_jax.batch import IMAGE_MEAN, IMAGE_STD
from neo_jax.model import layers
from neo_jax.model.rope import patch_rotary
from neo_jax.model_config import PATCH_CHANNELS, ModelConfig
from neo_jax.sharding import spec


def normalise(patches: jax.Array) -> jax.Array:
    """uint8 [..., C] (channel, y, x) -> float32, as torchvision's ToTensor and Normalize do.

    XLA multiplies by reciprocals of constants: within 1e-6 of the host's result.
    """
    mean_c, std_c = (np.repeat(x, PATCH_CHANNELS // 3) for x in (IMAGE_MEAN, IMAGE_STD))
    return (patches.astype(jnp.float32) / 255 - mean_c) / std_c


class PatchEmbed(nnx.Module):
    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = c
        e, d = c.vision_hidden_size, c.hidden_size
        self.patch_ce = layers.uniform(rngs, (PATCH_CHANNELS, e), PATCH_CHANNELS, None, None)
        self.patch_bias_e = layers.uniform(rngs, (e,), PATCH_CHANNELS, None)
        self.merge_qed = layers.uniform(rngs, (4, e, d), 4 * e, None, None, "embed")
        self.merge_bias_d = layers.uniform(rngs, (d,), 4 * e, None)

    def __call__(self, patches_bpc: jax.Array, hw_bp2: jax.Array) -> jax.Array:
        """Patches [B, P, C] in 2x2 block order, their rows and columns [B, P, 2] -> [B, P/4, D]."""
        if patches_bpc.dtype == jnp.uint8:
            patches_bpc = normalise(patches_bpc)
        y_bpe = self.rotated(self.activated(patches_bpc), hw_bp2)
        b, p, e = y_bpe.shape
        y_bmqe = y_bpe.astype(self.cfg.dtype).reshape(b, p // 4, 4, e)
        z_bmd = layers.einsum(
            "bmqe,qed->bmd", y_bmqe, self.merge_qed, out=spec("batch", None, None)
        )
        z32_bmd = z_bmd.astype(jnp.float32) + self.merge_bias_d[...].astype(jnp.float32)
        return z32_bmd.astype(z_bmd.dtype)

    def activated(self, patches_bpc: jax.Array) -> jax.Array:
        """First convolution and GELU: [B, P, C] -> [B, P, E] float32."""
        y_bpe = layers.einsum("bpc,ce->bpe", patches_bpc.astype(self.cfg.dtype), self.patch_ce)
        # Otherwise XLA:TPU fuses GELU's derivative into the product for patch_ce's gradient. That
        # one fusion took most of a step's compile time.
        y_bpe = jax.lax.optimization_barrier(y_bpe)
        y_bpe = y_bpe.astype(jnp.float32) + self.patch_bias_e[...].astype(jnp.float32)
        return jax.nn.gelu(y_bpe, approximate=False)

    def rotated(self, y_bpe: jax.Array, hw_bp2: jax.Array) -> jax.Array:
        """Rotary embedding by row and column of the patch grid, in float32."""
        rotary = patch_rotary(hw_bp2, y_bpe.shape[-1], self.cfg.rope_theta_vision)
        return layers.rotate(y_bpe, *rotary)
