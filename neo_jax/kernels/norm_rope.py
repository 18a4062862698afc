"""RMS norms of the parts of a head and its rotation, in one pass over memory.

A head's J channels come in halves, each divided into the same groups; channels of a group share a
norm, and a channel of the first half is rotated with the same one of the second (`attention.py`).

x [B, T, N, J] -> y [B, T, N, J], computed in float32. XLA makes a dozen passes of it, on a TPU a
fifth of a training step's time; the kernel reads once and writes once, heads side by side as lanes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from neo_jax.kernels.on_device import on_device

NAME = "norm_rope"
LANES = 128
ROWS = 256  # tokens of a block
MOST_LANES = 1024  # of a block


def norm_rope(x_btnj, scale_j, cos_bth, sin_bth, groups: tuple[int, ...], eps: float, kernel=None):
    """Norms, scales and turns heads.

    Args:
      x_btnj: [B, T, N, J].
      scale_j: [J] float32, of the norms.
      cos_bth, sin_bth: [B, T, J / 2] float32 angles of the pairs (i, i + J / 2).
      groups: widths of the norms' groups within a half; their sum is J / 2.
      eps: added to mean squares.
      kernel: True: the TPU kernel, interpreted where there is no TPU; None: the best.
    """
    run = functools.partial(_on_device, groups=groups, eps=eps, kernel=kernel)
    return on_device(run, (x_btnj, scale_j, cos_bth, sin_bth), out_like=0)


def _on_device(x_btnj, scale_j, cos_bth, sin_bth, groups, eps, kernel):
    half, length = x_btnj.shape[3] // 2, x_btnj.shape[1]
    if kernel is None and (half % LANES or length % LANES):
        return plain(x_btnj, scale_j, cos_bth, sin_bth, groups, eps)
    return _normed(x_btnj, scale_j, cos_bth, sin_bth, groups, eps, kernel)


def plain(x_btnj, scale_j, cos_bth, sin_bth, groups, eps):
    """The definition, in XLA."""
    first, second = jnp.split(x_btnj.astype(jnp.float32), 2, axis=-1)
    mean_square = jnp.einsum(
        "btnj,ji->btni",
        first * first + second * second,
        averaging(groups),
        precision=jax.lax.Precision.HIGHEST,
    )
    inverse = jax.lax.rsqrt(mean_square + eps)
    scale_first, scale_second = jnp.split(scale_j.astype(jnp.float32), 2)
    first, second = first * inverse * scale_first, second * inverse * scale_second
    cos, sin = cos_bth[:, :, None], sin_bth[:, :, None]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x_btnj.dtype)


def averaging(groups: tuple[int, ...]) -> np.ndarray:
    """[J/2, J/2]: sums of squares of a half's channels -> mean square of each channel's group."""
    group = np.repeat(np.arange(len(groups)), groups)
    in_group = group[:, None] == group[None, :]
    return (in_group / (2 * np.take(groups, group))).astype(np.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _normed(x_btnj, scale_j, cos_bth, sin_bth, groups, eps, kernel):
    return _forward(x_btnj, scale_j, cos_bth, sin_bth, groups, eps, kernel)[0]


def _forward(x_btnj, scale_j, cos_bth, sin_bth, groups, eps, kernel):
    arrays = (x_btnj, scale_j, cos_bth, sin_bth)
    options = {"groups": groups, "eps": eps}
    in_xla = functools.partial(plain, **options)
    return _choose(kernel, functools.partial(_forward_kernel, **options), in_xla)(*arrays), arrays


def _backward(groups, eps, kernel, arrays, dy_btnj):
    options = {"groups": groups, "eps": eps}

    def in_xla(dy_btnj, x_btnj, scale_j, cos_bth, sin_bth):
        run = functools.partial(plain, cos_bth=cos_bth, sin_bth=sin_bth, **options)
        return jax.vjp(run, x_btnj, scale_j)[1](dy_btnj)

    run = _choose(kernel, functools.partial(_backward_kernel, **options), in_xla)
    return *run(dy_btnj, *arrays), None, None


_normed.defvjp(_forward, _backward)


def _choose(kernel, pallas, in_xla):
    if kernel:
        pallas, in_xla = pallas, functools.partial(pallas, is_interpreted=True)
    return lambda *arrays: jax.lax.platform_dependent(*arrays, tpu=pallas, default=in_xla)


def _forward_kernel(x_btnj, scale_j, cos_bth, sin_bth, groups, eps, is_interpreted=False):
    def kernel(x_ref, scale_ref, cos_ref, sin_ref, average_ref, y_ref):
        half = cos_ref.shape[1]
        for begin in range(0, x_ref.shape[1], 2 * half):
            (first, second), inverse = _parts(x_ref, begin, average_ref, eps)
            first = first * inverse * scale_ref[:, :half]
            second = second * inverse * scale_ref[:, half:]
            cos, sin = cos_ref[...], sin_ref[...]
            y_ref[:, begin : begin + half] = (first * cos - second * sin).astype(y_ref.dtype)
            y_ref[:, begin + half : begin + 2 * half] = (second * cos + first * sin).astype(
                y_ref.dtype
            )

    call = _Call(x_btnj, is_interpreted)
    constants = call.constants(scale_j, cos_bth, sin_bth, groups)
    y_bti = call.run(kernel, [x_btnj], constants, [call.like_heads], NAME + "_forward")[0]
    return y_bti.reshape(x_btnj.shape)


def _backward_kernel(dy_btnj, x_btnj, scale_j, cos_bth, sin_bth, groups, eps, is_interpreted=False):
    def kernel(dy_ref, x_ref, scale_ref, cos_ref, sin_ref, average_ref, dx_ref, dscale_ref):
        half = cos_ref.shape[1]
        is_begin = [pl.program_id(axis) == 0 for axis in range(3)]

        @pl.when(is_begin[0] & is_begin[1] & is_begin[2])
        def _():
            dscale_ref[...] = jnp.zeros_like(dscale_ref)

        for begin in range(0, x_ref.shape[1], 2 * half):
            (first, second), inverse = _parts(x_ref, begin, average_ref, eps)
            dy_first = dy_ref[:, begin : begin + half].astype(jnp.float32)
            dy_second = dy_ref[:, begin + half : begin + 2 * half].astype(jnp.float32)
            cos, sin = cos_ref[...], sin_ref[...]
            d_first = dy_first * cos + dy_second * sin
            d_second = dy_second * cos - dy_first * sin
            first, second = first * inverse, second * inverse
            dscale_ref[:, :half] += jnp.sum(d_first * first, axis=0, keepdims=True)
            dscale_ref[:, half:] += jnp.sum(d_second * second, axis=0, keepdims=True)
            d_first, d_second = d_first * scale_ref[:, :half], d_second * scale_ref[:, half:]
            common = _averaged(d_first * first + d_second * second, average_ref)
            dx_ref[:, begin : begin + half] = (inverse * (d_first - first * common)).astype(
                dx_ref.dtype
            )
            dx_ref[:, begin + half : begin + 2 * half] = (
                inverse * (d_second - second * common)
            ).astype(dx_ref.dtype)

    call = _Call(x_btnj, is_interpreted)
    constants = call.constants(scale_j, cos_bth, sin_bth, groups)
    out = [call.like_heads, (jax.ShapeDtypeStruct((1, scale_j.size), jnp.float32), call.whole(1))]
    dx_bti, dscale = call.run(kernel, [dy_btnj, x_btnj], constants, out, NAME + "_backward")
    return dx_bti.reshape(x_btnj.shape), dscale[0].astype(scale_j.dtype)


def _parts(x_ref, begin, average_ref, eps):
    half = average_ref.shape[0]
    first = x_ref[:, begin : begin + half].astype(jnp.float32)
    second = x_ref[:, begin + half : begin + 2 * half].astype(jnp.float32)
    return (first, second), jax.lax.rsqrt(
        _averaged(first * first + second * second, average_ref) + eps
    )


def _averaged(x, average_ref):
    return jnp.dot(
        x,
        average_ref[...],
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


class _Call:
    """A kernel over blocks of tokens and heads of [B, T, N * J]."""

    def __init__(self, x_btnj, is_interpreted: bool):
        self.b, self.t, n, self.width = x_btnj.shape
        self.rows = ROWS if self.t % ROWS == 0 else LANES
        heads = max(h for h in range(1, n + 1) if n % h == 0 and h * self.width <= MOST_LANES)
        self.lanes, self.all_lanes = heads * self.width, n * self.width
        self.is_interpreted = is_interpreted
        self.heads = pl.BlockSpec(
            (None, self.rows, self.lanes), lambda row, token, head: (row, token, head)
        )
        like = jax.ShapeDtypeStruct((self.b, self.t, self.all_lanes), x_btnj.dtype)
        self.like_heads = (like, self.heads)

    def whole(self, rows: int) -> pl.BlockSpec:
        width = self.width if rows == 1 else rows
        return pl.BlockSpec((rows, width), lambda row, token, head: (0, 0))

    def constants(self, scale_j, cos_bth, sin_bth, groups):
        half = self.width // 2
        angles = pl.BlockSpec((None, self.rows, half), lambda row, token, head: (row, token, 0))
        return [
            (scale_j.astype(jnp.float32)[None], self.whole(1)),
            (cos_bth, angles),
            (sin_bth, angles),
            (jnp.asarray(averaging(groups)), self.whole(half)),
        ]

    def run(self, kernel, heads, constants, out, name):
        arrays = [array.reshape(self.b, self.t, -1) for array in heads]
        size = arrays[0].size
        return pl.pallas_call(
            kernel,
            grid=(self.b, self.t // self.rows, self.all_lanes // self.lanes),
            in_specs=[self.heads] * len(heads) + [block for _, block in constants],
            out_specs=[block for _, block in out],
            out_shape=[like for like, _ in out],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 3),
            cost_estimate=pl.CostEstimate(
                flops=20 * size,
                transcendentals=size // 2,
                bytes_accessed=(len(heads) + 1) * arrays[0].nbytes,
            ),
            name=name,
            interpret=self.is_interpreted,
        )(*arrays, *[array for array, _ in constants])
