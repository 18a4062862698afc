"""AdamW with warm-up and cosine decay, clipped by the global norm."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import optax

from neo_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    peak_lr: float = 5e-5
    min_lr_ratio: float = 0.1  # the last learning rate, as a share of the peak
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    not_decayed: tuple[str, ...] = (r".*norm(_[a-z]+)?", r".*_bias_[a-z]")  # path rules
    clip_norm: float = 1.0  # global norm of the gradient
    state_dtype: str = "float32"  # of the two moments; "bfloat16" halves them
    ema: float = 0.0  # decay of an average of the parameters; 0: none is kept

    def __post_init__(self):
        if self.state_dtype not in ("float32", "bfloat16"):
            raise InputError(f"optim.state_dtype {self.state_dtype!r}: use float32 or bfloat16")
        # With beta near 1 a second moment would never fall: bfloat16 rounds a step's decay away.
        if self.state_dtype == "bfloat16" and 1 - self.betas[1] < 2**-7:
            raise InputError(
                f"optim.state_dtype bfloat16 is too coarse for optim.betas {self.betas}: use a "
                "second one of at most 0.99, or float32"
            )
        if not 0 <= self.ema < 1 or not 0 <= self.min_lr_ratio <= 1 or self.clip_norm <= 0:
            raise InputError(
                f"optim: ema {self.ema}, min_lr_ratio {self.min_lr_ratio} and clip_norm "
                f"{self.clip_norm} must be in [0, 1), [0, 1] and above 0"
            )


def learning_rate(o: OptimConfig, steps: int) -> optax.Schedule:
    """Step, from 0, -> learning rate: linear from 0 to the peak, then a cosine to the minimum."""
    if not 0 <= o.warmup_steps < steps:
        raise InputError(f"optim.warmup_steps {o.warmup_steps} must be below the {steps} steps")
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if o.warmup_steps else o.peak_lr,
        peak_value=o.peak_lr,
        warmup_steps=o.warmup_steps,
        decay_steps=steps,
        end_value=o.peak_lr * o.min_lr_ratio,
    )


def make_optimizer(o: OptimConfig, steps: int) -> optax.GradientTransformation:
    """AdamW behind global-norm clipping, for the trainable parameters."""
    adamw = optax.adamw(
        learning_rate(o, steps),
        *o.betas,
        eps=o.eps,
        weight_decay=o.weight_decay,
        mask=lambda params: _decay_mask(params, o.not_decayed),
    )
    return optax.chain(optax.clip_by_global_norm(o.clip_norm), _cast_state(adamw, o.state_dtype))


def _decay_mask(params: dict, not_decayed: tuple[str, ...]) -> dict:
    """Of a tree of parameters, the tree of bools: whether weight decay applies."""

    def decays(path, leaf):
        name = "/".join(entry.key for entry in path)
        return not any(re.fullmatch(pattern, name) for pattern in not_decayed)

    return jax.tree_util.tree_map_with_path(decays, params)


def _cast_state(inner: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """`inner` with its state kept in `dtype`. It still computes in float32."""
    if dtype == "float32":
        return inner

    def cast(state, to):
        is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
        return jax.tree.map(lambda leaf: leaf.astype(to) if is_float(leaf) else leaf, state)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)
