"""Rotary angles: of the three position axes in attention, of the patch grid in patch embedding.

Every rotation in this project is of the channels i and i + half. Checkpoints have other channel
orders, so `weights/mapping.py` permutes channels at loading.
"""

import jax
import jax.numpy as jnp
import numpy as np


def frequencies(theta: float, width: int) -> np.ndarray:
    """[width / 2] float32: radians per position, of each pair of channels of a head."""
    exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return np.float32(1) / np.float32(theta) ** exponent


def thw_rotary(
    thw_bt3: jax.Array, t_width: int, hw_width: int, theta: float, theta_hw: float
) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, J / 2] of the joint T, H, W angles, float32.

    Angles stay in float32: bfloat16 cannot tell position 256 from 257.
    """
    freq_t, freq_hw = frequencies(theta, t_width), frequencies(theta_hw, hw_width // 2)
    angles = _angles(thw_bt3, (freq_t, freq_hw, freq_hw))
    return jnp.cos(angles), jnp.sin(angles)


def patch_rotary(hw_bp2: jax.Array, width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, P, width / 2]: first half of the channels by column, second by row."""
    freq = frequencies(theta, width // 2)
    angles = _angles(hw_bp2[..., ::-1], (freq, freq))
    return jnp.cos(angles), jnp.sin(angles)


def _angles(positions: jax.Array, freqs: tuple[np.ndarray, ...]) -> jax.Array:
    """The angles position[..., i] * freqs[i] of all axes i, concatenated."""
    positions = positions.astype(jnp.float32)
    return jnp.concatenate(
        [positions[..., i, None] * freq for i, freq in enumerate(freqs)], axis=-1
    )
