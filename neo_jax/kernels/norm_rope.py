"""RMS norm and rotary embedding of query and key heads, in one pass over memory.

    input     T channels [T1 T2], H and W channels [H1 W1 H2 W2]
    output    [T1 H1 W1 | T2 H2 W2]

Channels of the same axis share a norm. Channel i of the first half is rotated with channel i of
the second. The computation is in float32.

XLA makes a dozen passes of this, on a TPU a fifth of a training step's time. The kernel reads and
writes every number once, with heads side by side as lanes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from neo_jax.kernels.shard_kernel import shard_kernel

NAME = "norm_rope"
LANES = 128
ROWS = 256  # tokens of a block
MAX_HEADS = 4  # of a block


def norm_rope(
    t_btnh, hw_btnh, scale_j, cos_bti, sin_bti, groups: tuple[int, ...], eps: float, kernel=None
):
    """Joins, normalises, scales and rotates heads: [B, T, N, J].

    Args:
      t_btnh, hw_btnh: [B, T, N, width] the two parts; J is the sum of their widths.
      scale_j: [J] float32, of the norms.
      cos_bti, sin_bti: [B, T, J / 2] float32 angles of the pairs (i, i + J / 2).
      groups: widths of the norms' groups within a half; their sum is J / 2.
      eps: added to mean squares.
      kernel: True: the TPU kernel, interpreted without a TPU; None: the fastest.
    """
    run = functools.partial(_local_norm_rope, groups=groups, eps=eps, kernel=kernel)
    return shard_kernel(run, (t_btnh, hw_btnh, scale_j, cos_bti, sin_bti), out_like=0)


def _local_norm_rope(t_btnh, hw_btnh, scale_j, cos_bti, sin_bti, groups, eps, kernel):
    arrays = (t_btnh, hw_btnh, scale_j, cos_bti, sin_bti)
    widths = {t_btnh.shape[3], hw_btnh.shape[3]}
    if kernel is None and (widths != {LANES} or t_btnh.shape[1] % LANES):
        return norm_rope_xla(*arrays, groups, eps)
    return _norm_rope(*arrays, groups, eps, kernel)


def norm_rope_xla(t_btnh, hw_btnh, scale_j, cos_bti, sin_bti, groups, eps):
    """`norm_rope` by its definition, in XLA."""
    parts = [jnp.split(part.astype(jnp.float32), 2, axis=-1) for part in (t_btnh, hw_btnh)]
    first, second = (jnp.concatenate(halves, axis=-1) for halves in zip(*parts, strict=True))
    mean_square = jnp.einsum(
        "btnj,ji->btni",
        first * first + second * second,
        averaging_matrix(groups),
        precision=jax.lax.Precision.HIGHEST,
    )
    inverse = jax.lax.rsqrt(mean_square + eps)
    scale_first, scale_second = jnp.split(scale_j.astype(jnp.float32), 2)
    first, second = first * inverse * scale_first, second * inverse * scale_second
    cos, sin = cos_bti[:, :, None], sin_bti[:, :, None]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(t_btnh.dtype)


def averaging_matrix(groups: tuple[int, ...]) -> np.ndarray:
    """[J/2, J/2]: maps x1^2 + x2^2 of the two halves to the mean square of each channel's group."""
    group = np.repeat(np.arange(len(groups)), groups)
    in_group = group[:, None] == group[None, :]
    return (in_group / (2 * np.take(groups, group))).astype(np.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _norm_rope(t_btnh, hw_btnh, scale_j, cos_bti, sin_bti, groups, eps, kernel):
    return _forward(t_btnh, hw_btnh, scale_j, cos_bti, sin_bti, groups, eps, kernel)[0]


def _forward(t_btnh, hw_btnh, scale_j, cos_bti, sin_bti, groups, eps, kernel):
    arrays = (t_btnh, hw_btnh, scale_j, cos_bti, sin_bti)
    options = {"groups": groups, "eps": eps}
    xla = functools.partial(norm_rope_xla, **options)
    return _choose(kernel, functools.partial(_forward_kernel, **options), xla)(*arrays), arrays


def _backward(groups, eps, kernel, arrays, dy_btnj):
    options = {"groups": groups, "eps": eps}

    def xla(dy_btnj, t_btnh, hw_btnh, scale_j, cos_bti, sin_bti):
        run = functools.partial(norm_rope_xla, cos_bti=cos_bti, sin_bti=sin_bti, **options)
        return jax.vjp(run, t_btnh, hw_btnh, scale_j)[1](dy_btnj)

    run = _choose(kernel, functools.partial(_backward_kernel, **options), xla)
    return *run(dy_btnj, *arrays), None, None


_norm_rope.defvjp(_forward, _backward)


def _choose(kernel, pallas, xla):
    if kernel:
        xla = functools.partial(pallas, is_interpreted=True)
    return lambda *arrays: jax.lax.platform_dependent(*arrays, tpu=pallas, default=xla)


def _forward_kernel(t_btnh, hw_btnh, scale_j, cos_bti, sin_bti, groups, eps, is_interpreted=False):
    def kernel(t_ref, hw_ref, scale_ref, cos_ref, sin_ref, average_ref, y_ref):
        for head in range(t_ref.shape[1] // LANES):
            first, second = _halves(t_ref, hw_ref, head)
            inverse = _inverse_rms(first, second, average_ref, eps)
            first = first * inverse * scale_ref[:, :LANES]
            second = second * inverse * scale_ref[:, LANES:]
            cos, sin = cos_ref[...], sin_ref[...]
            lane = 2 * head * LANES
            y_first, y_second = first * cos - second * sin, second * cos + first * sin
            y_ref[:, lane : lane + LANES] = y_first.astype(y_ref.dtype)
            y_ref[:, lane + LANES : lane + 2 * LANES] = y_second.astype(y_ref.dtype)

    call = _BlockedCall(t_btnh, is_interpreted)
    arrays = [call.heads(t_btnh), call.heads(hw_btnh)]
    arrays += call.constants(scale_j, cos_bti, sin_bti, groups)
    (y_bti,) = call.run(kernel, arrays, [call.output(2 * LANES)], NAME + "_forward", "parallel")
    return y_bti.reshape(*t_btnh.shape[:3], 2 * LANES)


def _backward_kernel(
    dy_btnj, t_btnh, hw_btnh, scale_j, cos_bti, sin_bti, groups, eps, is_interpreted=False
):
    def kernel(
        dy_ref, t_ref, hw_ref, scale_ref, cos_ref, sin_ref, average_ref, dt_ref, dhw_ref, dscale_ref
    ):
        is_first = [pl.program_id(axis) == 0 for axis in range(3)]

        @pl.when(is_first[0] & is_first[1] & is_first[2])
        def _():
            dscale_ref[...] = jnp.zeros_like(dscale_ref)

        for head in range(t_ref.shape[1] // LANES):
            first, second = _halves(t_ref, hw_ref, head)
            inverse = _inverse_rms(first, second, average_ref, eps)
            lane = 2 * head * LANES
            dy_first = dy_ref[:, lane : lane + LANES].astype(jnp.float32)
            dy_second = dy_ref[:, lane + LANES : lane + 2 * LANES].astype(jnp.float32)
            cos, sin = cos_ref[...], sin_ref[...]
            d_first = dy_first * cos + dy_second * sin
            d_second = dy_second * cos - dy_first * sin
            first, second = first * inverse, second * inverse
            dscale_ref[:, :LANES] += jnp.sum(d_first * first, axis=0, keepdims=True)
            dscale_ref[:, LANES:] += jnp.sum(d_second * second, axis=0, keepdims=True)
            d_first, d_second = d_first * scale_ref[:, :LANES], d_second * scale_ref[:, LANES:]
            mean = _group_mean(d_first * first + d_second * second, average_ref)
            d_first = inverse * (d_first - first * mean)
            d_second = inverse * (d_second - second * mean)
            is_t, part = _is_t(first), slice(head * LANES, (head + 1) * LANES)
            dt_ref[:, part] = jnp.where(is_t, d_first, _swap_halves(d_second)).astype(dt_ref.dtype)
            dhw_ref[:, part] = jnp.where(is_t, _swap_halves(d_first), d_second).astype(
                dhw_ref.dtype
            )

    call = _BlockedCall(t_btnh, is_interpreted)
    arrays = [call.heads(dy_btnj), call.heads(t_btnh), call.heads(hw_btnh)]
    arrays += call.constants(scale_j, cos_bti, sin_bti, groups)
    dscale = (jax.ShapeDtypeStruct((1, scale_j.size), jnp.float32), _whole_array(1, scale_j.size))
    out = [call.output(LANES), call.output(LANES), dscale]
    dt_bti, dhw_bti, dscale = call.run(kernel, arrays, out, NAME + "_backward", "arbitrary")
    parts = (part.reshape(t_btnh.shape) for part in (dt_bti, dhw_bti))
    return *parts, dscale[0].astype(scale_j.dtype)


def _halves(t_ref, hw_ref, head: int):
    """[T1 H1 W1] and [T2 H2 W2] of a head whose parts are [T1 T2] and [H1 W1 H2 W2]."""
    part = slice(head * LANES, (head + 1) * LANES)
    t, hw = (ref[:, part].astype(jnp.float32) for ref in (t_ref, hw_ref))
    is_t = _is_t(t)
    return jnp.where(is_t, t, _swap_halves(hw)), jnp.where(is_t, _swap_halves(t), hw)


def _is_t(x):
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < LANES // 2


def _swap_halves(x):
    """The two halves of the lanes in the other order."""
    return pltpu.roll(x, LANES // 2, axis=1)


def _inverse_rms(first, second, average_ref, eps):
    return jax.lax.rsqrt(_group_mean(first * first + second * second, average_ref) + eps)


def _group_mean(x, average_ref):
    return jnp.dot(
        x,
        average_ref[...],
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _whole_array(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda row, token, head: (0, 0))


class _BlockedCall:
    """A `pallas_call` over blocks of tokens and heads of arrays [B, T, N * width]."""

    def __init__(self, t_btnh, is_interpreted: bool):
        self.b, self.t, self.n, _ = t_btnh.shape
        self.rows = ROWS if self.t % ROWS == 0 else LANES
        self.num_heads = max(h for h in range(1, MAX_HEADS + 1) if self.n % h == 0)
        self.dtype, self.is_interpreted = t_btnh.dtype, is_interpreted

    def heads(self, array_btnh):
        """The array with heads side by side, and its block spec."""
        width = array_btnh.shape[3]
        return array_btnh.reshape(self.b, self.t, self.n * width), self._block(width)

    def output(self, width: int):
        """The shape of a result with heads side by side, and its block spec."""
        shape = jax.ShapeDtypeStruct((self.b, self.t, self.n * width), self.dtype)
        return shape, self._block(width)

    def _block(self, width: int) -> pl.BlockSpec:
        shape = (None, self.rows, self.num_heads * width)
        return pl.BlockSpec(shape, lambda row, token, head: (row, token, head))

    def constants(self, scale_j, cos_bti, sin_bti, groups):
        angles = pl.BlockSpec((None, self.rows, LANES), lambda row, token, head: (row, token, 0))
        return [
            (scale_j.astype(jnp.float32)[None], _whole_array(1, 2 * LANES)),
            (cos_bti, angles),
            (sin_bti, angles),
            (jnp.asarray(averaging_matrix(groups)), _whole_array(LANES, LANES)),
        ]

    def run(self, kernel, arrays, out, name, semantics):
        numbers = self.b * self.t * self.n * 2 * LANES
        return pl.pallas_call(
            kernel,
            grid=(self.b, self.t // self.rows, self.n // self.num_heads),
            in_specs=[block for _, block in arrays],
            out_specs=[block for _, block in out],
            out_shape=[shape for shape, _ in out],
            compiler_params=pltpu.CompilerParams(dimension_semantics=(semantics,) * 3),
            cost_estimate=pl.CostEstimate(
                flops=20 * numbers,
                transcendentals=numbers // 2,
                bytes_accessed=2 * numbers * self.dtype.itemsize,
            ),
            name=name,
            interpret=self.is_interpreted,
        )(*[array for array, _ in arrays])
