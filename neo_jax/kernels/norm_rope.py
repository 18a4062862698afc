"""RMS norms of the parts of a head and its rotation, in one pass over memory.

A head comes in two parts, T channels and H/W channels, each in halves, and leaves as
[T1 H1 W1 | T2 H2 W2]. Channels of a half that belong to the same axis share a norm, and a channel
of the first half is rotated with the same one of the second. It is computed in float32.

XLA makes a dozen passes of this, on a TPU a fifth of a training step's time; the kernel reads once
and writes once, heads side by side as lanes, and puts the parts together on the way.
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
MOST_HEADS = 4  # of a block


def norm_rope(
    t_btnh, hw_btnh, scale_j, cos_bti, sin_bti, groups: tuple[int, ...], eps: float, kernel=None
):
    """Joins, norms, scales and turns heads: [B, T, N, J].

    Args:
      t_btnh, hw_btnh: [B, T, N, width] the two parts; J is the sum of their widths.
      scale_j: [J] float32, of the norms.
      cos_bti, sin_bti: [B, T, J / 2] float32 angles of the pairs (i, i + J / 2).
      groups: widths of the norms' groups within a half; their sum is J / 2.
      eps: added to mean squares.
      kernel: True: the TPU kernel, interpreted where there is no TPU; None: the best.
    """
    run = functools.partial(_on_device, groups=groups, eps=eps, kernel=kernel)
    return shard_kernel(run, (t_btnh, hw_btnh, scale_j, cos_bti, sin_bti), out_like=0)


def _on_device(t_btnh, hw_btnh, scale_j, cos_bti, sin_bti, groups, eps, kernel):
    arrays = (t_btnh, hw_btnh, scale_j, cos_bti, sin_bti)
    widths = {t_btnh.shape[3], hw_btnh.shape[3]}
    if kernel is None and (widths != {LANES} or t_btnh.shape[1] % LANES):
        return plain(*arrays, groups, eps)
    return _normed(*arrays, groups, eps, kernel)


def plain(t_btnh, hw_btnh, scale_j, cos_bti, sin_bti, groups, eps):
    """The definition, in XLA."""
    parts = [jnp.split(part.astype(jnp.float32), 2, axis=-1) for part in (t_btnh, hw_btnh)]
    first, second = (jnp.concatenate(halves, axis=-1) for halves in zip(*parts, strict=True))
    mean_square = jnp.einsum(
        "btnj,ji->btni",
        first * first + second * second,
        averaging(groups),
        precision=jax.lax.Precision.HIGHEST,
    )
    inverse = jax.lax.rsqrt(mean_square + eps)
    scale_first, scale_second = jnp.split(scale_j.astype(jnp.float32), 2)
    first, second = first * inverse * scale_first, second * inverse * scale_second
    cos, sin = cos_bti[:, :, None], sin_bti[:, :, None]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(t_btnh.dtype)


def averaging(groups: tuple[int, ...]) -> np.ndarray:
    """[J/2, J/2]: sums of squares of a half's channels -> mean square of each channel's group."""
    group = np.repeat(np.arange(len(groups)), groups)
    in_group = group[:, None] == group[None, :]
    return (in_group / (2 * np.take(groups, group))).astype(np.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _normed(t_btnh, hw_btnh, scale_j, cos_bti, sin_bti, groups, eps, kernel):
    return _forward(t_btnh, hw_btnh, scale_j, cos_bti, sin_bti, groups, eps, kernel)[0]


def _forward(t_btnh, hw_btnh, scale_j, cos_bti, sin_bti, groups, eps, kernel):
    arrays = (t_btnh, hw_btnh, scale_j, cos_bti, sin_bti)
    options = {"groups": groups, "eps": eps}
    in_xla = functools.partial(plain, **options)
    return _choose(kernel, functools.partial(_forward_kernel, **options), in_xla)(*arrays), arrays


def _backward(groups, eps, kernel, arrays, dy_btnj):
    options = {"groups": groups, "eps": eps}

    def in_xla(dy_btnj, t_btnh, hw_btnh, scale_j, cos_bti, sin_bti):
        run = functools.partial(plain, cos_bti=cos_bti, sin_bti=sin_bti, **options)
        return jax.vjp(run, t_btnh, hw_btnh, scale_j)[1](dy_btnj)

    run = _choose(kernel, functools.partial(_backward_kernel, **options), in_xla)
    return *run(dy_btnj, *arrays), None, None


_normed.defvjp(_forward, _backward)


def _choose(kernel, pallas, in_xla):
    if kernel:
        in_xla = functools.partial(pallas, is_interpreted=True)
    return lambda *arrays: jax.lax.platform_dependent(*arrays, tpu=pallas, default=in_xla)


def _forward_kernel(t_btnh, hw_btnh, scale_j, cos_bti, sin_bti, groups, eps, is_interpreted=False):
    def kernel(t_ref, hw_ref, scale_ref, cos_ref, sin_ref, average_ref, y_ref):
        for head in range(t_ref.shape[1] // LANES):
            first, second = _halves(t_ref, hw_ref, head)
            inverse = _inverse(first, second, average_ref, eps)
            first = first * inverse * scale_ref[:, :LANES]
            second = second * inverse * scale_ref[:, LANES:]
            cos, sin = cos_ref[...], sin_ref[...]
            here = 2 * head * LANES
            turned = first * cos - second * sin, second * cos + first * sin
            y_ref[:, here : here + LANES] = turned[0].astype(y_ref.dtype)
            y_ref[:, here + LANES : here + 2 * LANES] = turned[1].astype(y_ref.dtype)

    call = _Call(t_btnh, is_interpreted)
    arrays = [call.heads(t_btnh), call.heads(hw_btnh)]
    arrays += call.constants(scale_j, cos_bti, sin_bti, groups)
    (y_bti,) = call.run(kernel, arrays, [call.like(2 * LANES)], NAME + "_forward", "parallel")
    return y_bti.reshape(*t_btnh.shape[:3], 2 * LANES)


def _backward_kernel(
    dy_btnj, t_btnh, hw_btnh, scale_j, cos_bti, sin_bti, groups, eps, is_interpreted=False
):
    def kernel(
        dy_ref, t_ref, hw_ref, scale_ref, cos_ref, sin_ref, average_ref, dt_ref, dhw_ref, dscale_ref
    ):
        is_begin = [pl.program_id(axis) == 0 for axis in range(3)]

        @pl.when(is_begin[0] & is_begin[1] & is_begin[2])
        def _():
            dscale_ref[...] = jnp.zeros_like(dscale_ref)

        for head in range(t_ref.shape[1] // LANES):
            first, second = _halves(t_ref, hw_ref, head)
            inverse = _inverse(first, second, average_ref, eps)
            here = 2 * head * LANES
            dy_first = dy_ref[:, here : here + LANES].astype(jnp.float32)
            dy_second = dy_ref[:, here + LANES : here + 2 * LANES].astype(jnp.float32)
            cos, sin = cos_ref[...], sin_ref[...]
            d_first = dy_first * cos + dy_second * sin
            d_second = dy_second * cos - dy_first * sin
            first, second = first * inverse, second * inverse
            dscale_ref[:, :LANES] += jnp.sum(d_first * first, axis=0, keepdims=True)
            dscale_ref[:, LANES:] += jnp.sum(d_second * second, axis=0, keepdims=True)
            d_first, d_second = d_first * scale_ref[:, :LANES], d_second * scale_ref[:, LANES:]
            common = _averaged(d_first * first + d_second * second, average_ref)
            d_first = inverse * (d_first - first * common)
            d_second = inverse * (d_second - second * common)
            is_t, part = _is_t(first), slice(head * LANES, (head + 1) * LANES)
            dt_ref[:, part] = jnp.where(is_t, d_first, _swapped(d_second)).astype(dt_ref.dtype)
            dhw_ref[:, part] = jnp.where(is_t, _swapped(d_first), d_second).astype(dhw_ref.dtype)

    call = _Call(t_btnh, is_interpreted)
    arrays = [call.heads(dy_btnj), call.heads(t_btnh), call.heads(hw_btnh)]
    arrays += call.constants(scale_j, cos_bti, sin_bti, groups)
    dscale = (jax.ShapeDtypeStruct((1, scale_j.size), jnp.float32), _whole(1, scale_j.size))
    out = [call.like(LANES), call.like(LANES), dscale]
    dt_bti, dhw_bti, dscale = call.run(kernel, arrays, out, NAME + "_backward", "arbitrary")
    parts = (part.reshape(t_btnh.shape) for part in (dt_bti, dhw_bti))
    return *parts, dscale[0].astype(scale_j.dtype)


def _halves(t_ref, hw_ref, head: int):
    """[T1 H1 W1] and [T2 H2 W2] of a head whose parts are [T1 T2] and [H1 W1 H2 W2]."""
    part = slice(head * LANES, (head + 1) * LANES)
    t, hw = (ref[:, part].astype(jnp.float32) for ref in (t_ref, hw_ref))
    is_t = _is_t(t)
    return jnp.where(is_t, t, _swapped(hw)), jnp.where(is_t, _swapped(t), hw)


def _is_t(x):
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < LANES // 2


def _swapped(x):
    """Its two halves of lanes changed round."""
    return pltpu.roll(x, LANES // 2, axis=1)


def _inverse(first, second, average_ref, eps):
    return jax.lax.rsqrt(_averaged(first * first + second * second, average_ref) + eps)


def _averaged(x, average_ref):
    return jnp.dot(
        x,
        average_ref[...],
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _whole(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda row, token, head: (0, 0))


class _Call:
    """A kernel over blocks of tokens and heads of [B, T, N * width]."""

    def __init__(self, t_btnh, is_interpreted: bool):
        self.b, self.t, self.n, _ = t_btnh.shape
        self.rows = ROWS if self.t % ROWS == 0 else LANES
        self.num_heads = max(h for h in range(1, MOST_HEADS + 1) if self.n % h == 0)
        self.dtype, self.is_interpreted = t_btnh.dtype, is_interpreted

    def heads(self, array_btnh):
        """Heads side by side, and their blocks."""
        width = array_btnh.shape[3]
        return array_btnh.reshape(self.b, self.t, self.n * width), self._block(width)

    def like(self, width: int):
        like = jax.ShapeDtypeStruct((self.b, self.t, self.n * width), self.dtype)
        return like, self._block(width)

    def _block(self, width: int) -> pl.BlockSpec:
        shape = (None, self.rows, self.num_heads * width)
        return pl.BlockSpec(shape, lambda row, token, head: (row, token, head))

    def constants(self, scale_j, cos_bti, sin_bti, groups):
        angles = pl.BlockSpec((None, self.rows, LANES), lambda row, token, head: (row, token, 0))
        return [
            (scale_j.astype(jnp.float32)[None], _whole(1, 2 * LANES)),
            (cos_bti, angles),
            (sin_bti, angles),
            (jnp.asarray(averaging(groups)), _whole(LANES, LANES)),
        ]

    def run(self, kernel, arrays, out, name, semantics):
        numbers = self.b * self.t * self.n * 2 * LANES
        return pl.pallas_call(
            kernel,
            grid=(self.b, self.t // self.rows, self.n // self.num_heads),
            in_specs=[block for _, block in arrays],
            out_specs=[block for _, block in out],
            out_shape=[like for like, _ in out],
            compiler_params=pltpu.CompilerParams(dimension_semantics=(semantics,) * 3),
            cost_estimate=pl.CostEstimate(
                flops=20 * numbers,
                transcendentals=numbers // 2,
                bytes_accessed=2 * numbers * self.dtype.itemsize,
            ),
            name=name,
            interpret=self.is_interpreted,
        )(*[array for array, _ in arrays])
