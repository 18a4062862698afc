"""What the model's modules share: parameters, products with weights, norms, rotation.

Dimension letters, the same in every name and einsum: b batch, t / s query / key position,
d hidden, n / k query / kv heads, h value head, j query-key head, f feed-forward, v vocabulary,
l layer, p patch, c numbers in a patch, e channels between the two convolutions, m visual token.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from neo_jax.collectives import all_gather_fsdp
from neo_jax.model import lora
from neo_jax.model.int8 import Int8Matrix
from neo_jax.model.lora import LoraMatrix
from neo_jax.sharding import partition_spec, without_fsdp

Weight = jax.Array | Int8Matrix | LoraMatrix


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], *names: str | None) -> nnx.Param:
    """A parameter drawn from N(0, 0.02), split over the mesh by its dimensions' names."""
    return nnx.Param(
        jax.nn.initializers.normal(0.02)(rngs.params(), shape), out_sharding=partition_spec(*names)
    )


def uniform(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, *names: str | None) -> nnx.Param:
    """A parameter drawn from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as PyTorch's convolutions."""
    bound = fan_in**-0.5
    value = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
    return nnx.Param(value, out_sharding=partition_spec(*names))


def ones(size: int) -> nnx.Param:
    """The scale of a norm."""
    return nnx.Param(jnp.ones(size), out_sharding=P(None))


def all_gather_params(weight: nnx.Param | Weight, dtype: str) -> Weight:
    """A weight ready to compute with: cast to `dtype`, then all-gathered over `fsdp`.

    The cast comes first because bfloat16 has half the bytes to move. An int8 matrix is not cast.
    """
    partition = weight.get_metadata("out_sharding") if isinstance(weight, nnx.Param) else P()
    weight = weight[...]
    if not isinstance(weight, Int8Matrix):
        partitions = weight.partitions(partition) if isinstance(weight, LoraMatrix) else partition
        weight = jax.tree.map(
            lambda part, partition: all_gather_fsdp(part.astype(dtype), partition),
            weight,
            partitions,
        )
    return jax.tree.map(
        lambda part: jax.sharding.reshard(part, without_fsdp(jax.typeof(part).sharding.spec)),
        weight,
    )


def einsum(
    equation: str,
    x: jax.Array,
    weight: nnx.Param | Weight,
    *,
    out: P | None = None,
    dtype: str | None = None,
) -> jax.Array:
    """A product of activations and a weight, in `dtype`; default: the activations' type.

    The weight is all-gathered first. Float32 factors are not rounded, as TPUs and GPUs would do by
    default. The scales of an int8 weight multiply the product, whose last dimensions are the
    weight's outputs.
    """
    weight, scale = all_gather_params(weight, x.dtype), None
    if isinstance(weight, LoraMatrix):
        return lora.einsum(equation, x, weight, dtype or x.dtype)
    if isinstance(weight, Int8Matrix):
        letters, kept = equation.split(",")[1].split("->")
        contracted = [axis for axis, letter in enumerate(letters) if letter not in kept]
        scale = jnp.squeeze(weight.scale, contracted)
        weight = weight.values.astype(x.dtype)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    product = functools.partial(
        jnp.einsum, equation, precision=precision, preferred_element_type=dtype, out_sharding=out
    )
    if equation.startswith("bt") and weight.ndim == 2 and x.shape[1] == 1 and _is_one_row(x):
        y = jax.lax.platform_dependent(
            x, weight, tpu=functools.partial(_product_of_two_rows, product), default=product
        )
    else:
        y = product(x, weight)
    return y if scale is None else (y * scale).astype(y.dtype)


def _is_one_row(x: jax.Array) -> bool:
    """Whether a device's part of the batch is one row."""
    return jax.typeof(x).sharding.shard_shape(x.shape)[0] == 1


def _product_of_two_rows(product: Callable, x: jax.Array, weight: jax.Array) -> jax.Array:
    """A product of one row [1, 1, ...], computed with the row twice.

    XLA:TPU does not use the matrix unit for a single row, and then reads the weight at less than
    half of the memory's bandwidth.
    """
    two = jax.lax.optimization_barrier(jnp.concatenate([x, x], axis=1))
    return product(two, weight)[:, :1]


def row_major(array: jax.Array) -> jax.Array:
    """Forces row-major layout.

    With one row per device, XLA:TPU would otherwise choose a layout that is slow for everything but
    matmuls. For a slice of a cache, it would otherwise change the layout of the whole cache to one
    that suits attention; with this, only that of the slice.
    """
    return with_layout_constraint(array, Layout(tuple(range(array.ndim))))


def take_rows(table: jax.Array | Int8Matrix, index: jax.Array, dtype: str) -> jax.Array:
    """Rows [..., D] of a table from `all_gather_params`; only they are dequantized."""
    if index.size == 1 and isinstance(table, Int8Matrix):
        # For a single row, XLA:TPU would first copy the whole int8 table to another tiling.
        return take_rows(table, jnp.stack([index, index]), dtype)[0]
    return (table[index] if isinstance(table, Int8Matrix) else _rows(table, index)).astype(dtype)


def _rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of a table, whose gradients are summed in float32.

    A batch has a thousand newlines, and a sum in bfloat16 stops growing at the 256th equal summand.
    """

    @jax.custom_vjp
    def rows(table, index):
        return table[index]

    def backward(index, dy):
        sums = jnp.zeros(table.shape, jnp.float32).at[index].add(dy.astype(jnp.float32))
        return sums.astype(table.dtype), None

    rows.defvjp(lambda table, index: (table[index], index), backward)
    return rows(table, index)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, in float32, returned in x's type."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    y32 = x32 * jax.lax.rsqrt(mean_square + eps) * scale[...].astype(jnp.float32)
    return y32.astype(x.dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + half) of the last axis by their angles; cos, sin [..., half]."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
