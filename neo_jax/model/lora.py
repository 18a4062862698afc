"""LoRA, low-rank adaptation: a frozen matrix and two small factors that are trained.

A `LoraMatrix` takes the place of the matrix in the parameters, as an `Int8Matrix` does:

    matrix [in..., out...]      a [in..., r]      b [r, out...]
    `layers.einsum`:            x matrix + scale * (x a) b

`b` starts at zero, so training starts from the matrix itself.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from neo_jax.errors import InputError
from neo_jax.model.int8 import CONTRACTING_DIMS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraMatrix:
    """matrix + scale * a b, or a stack of such matrices."""

    matrix: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix.shape

    def __getitem__(self, index) -> "LoraMatrix":
        return self if index is Ellipsis else jax.tree.map(lambda part: part[index], self)

    def partitions(self, partition: P) -> "LoraMatrix":
        """The partitions of matrix, a and b of one layer, from that of the matrix."""
        num_inputs = self.a.ndim - 1
        a, b = P(*partition[:num_inputs], None), P(None, *partition[num_inputs:])
        return dataclasses.replace(self, matrix=partition, a=a, b=b)


def einsum(equation: str, x: jax.Array, weight: LoraMatrix, dtype: str) -> jax.Array:
    """x matrix + scale * (x a) b in `dtype`.

    Args:
      equation: of x and the matrix; contracts the last dimension of x and the first of the matrix.
      weight: all-gathered over fsdp. The product's rows are split as x is, its outputs as the
        matrix.

    The two terms are added in float32: at first (x a) b is far below the rounding of bfloat16, of
    the matrix and of the product. Gradients are those of products in x's type. Partial sums over
    devices are added first, so that a product or a gradient has one psum and not one per term.
    """
    letters = equation.split(",")[0]
    to_rank = f"{letters},{letters[-1]}r->{letters[:-1]}r"
    from_rank = equation.replace(letters[-1], "r")
    of_x, of_weight = jax.tree.map(lambda part: jax.typeof(part).sharding.spec, (x, weight))
    of_y = P(*of_x[:-1], *of_weight.matrix[1:])
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    multiply = functools.partial(jnp.einsum, precision=precision)

    def terms(x, weight, dtype):
        change = multiply(from_rank, multiply(to_rank, x, weight.a) * weight.scale, weight.b)
        return multiply(equation, x, weight.matrix, preferred_element_type=dtype) + change

    def psum(part, partition):
        contracted = _mesh_axes(of_x, of_weight.matrix) - _mesh_axes(partition)
        return jax.lax.psum(part, tuple(sorted(contracted)))

    def forward(x, weight):
        return psum(terms(x, weight, jnp.float32).astype(dtype), of_y)

    def backward(x, weight, dy):
        _, gradients = jax.vjp(functools.partial(terms, dtype=x.dtype), x, weight)
        return jax.tree.map(psum, gradients(dy.astype(x.dtype)), (of_x, of_weight))

    in_specs, shard_map = (of_x, of_weight), functools.partial(jax.shard_map, check_vma=False)
    run = jax.custom_vjp(shard_map(forward, in_specs=in_specs, out_specs=of_y))
    run_backward = shard_map(backward, in_specs=(*in_specs, of_y), out_specs=in_specs)
    run.defvjp(lambda *saved: (run(*saved), saved), lambda saved, dy: run_backward(*saved, dy))
    return run(x, weight)


def _mesh_axes(*partitions: P) -> set[str]:
    """The mesh axes that partitions name."""
    entries = [entry for partition in partitions for entry in partition if entry]
    return set().union(*(entry if isinstance(entry, tuple) else (entry,) for entry in entries))


def new_factors(params: dict, paths: Sequence[str], rank: int, key: jax.Array) -> dict:
    """New factors {path: {"a", "b"}}, as a nested dict, of the matrices at `paths`.

    Call it inside jit.

    Raises:
      InputError: if a path is not a matrix of a layer.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    factors: dict[str, Any] = {}
    for number, path in enumerate(paths):
        stack, _, name = path.rpartition("/")
        if not stack or name not in CONTRACTING_DIMS:
            raise InputError(f"lora.targets: {path} is not a matrix of a layer")
        matrix = flat[path]
        split = 1 + len(
            CONTRACTING_DIMS[name]
        )  # dimensions of layer and inputs; those of outputs follow
        spec, shape = jax.typeof(matrix).sharding.spec, matrix.shape
        normal = jax.random.normal(jax.random.fold_in(key, number), (*shape[:split], rank))
        a = normal / math.sqrt(math.prod(shape[1:split]))
        factors[f"{path}/a"] = jax.sharding.reshard(a, P(*spec[:split], None))
        factors[f"{path}/b"] = jnp.zeros(
            (shape[0], rank, *shape[split:]), out_sharding=P(None, None, *spec[split:])
        )
    return traverse_util.unflatten_dict(factors, sep="/")


def with_lora(factors: dict, params: dict, scale: float) -> dict:
    """The parameters with a `LoraMatrix` wherever there are factors."""
    flat = traverse_util.flatten_dict(params, sep="/")
    flat_factors = traverse_util.flatten_dict(factors, sep="/")
    for path in {path.rpartition("/")[0] for path in flat_factors}:
        flat[path] = LoraMatrix(
            flat[path], flat_factors[f"{path}/a"], flat_factors[f"{path}/b"], scale
        )
    return traverse_util.unflatten_dict(flat, sep="/")


def merge_lora(factors: dict, params: dict, scale: float) -> dict:
    """The parameters with the factors merged into their matrices. Call it inside jit."""
    is_lora = lambda leaf: isinstance(leaf, LoraMatrix)  # noqa: E731
    return jax.tree.map(
        lambda leaf: jax.vmap(_merge_layer)(leaf) if is_lora(leaf) else leaf,
        with_lora(factors, params, scale),
        is_leaf=is_lora,
    )


def _merge_layer(layer: LoraMatrix) -> jax.Array:
    """matrix + scale * a b, summed in float32; in the matrix's type, and split as it is."""
    change = jnp.tensordot(
        layer.a.astype(jnp.float32),
        layer.b.astype(jnp.float32),
        axes=1,
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=jax.typeof(layer.matrix).sharding.spec,
    )
    merged = layer.matrix.astype(jnp.float32) + jnp.float32(layer.scale) * change
    return merged.astype(layer.matrix.dtype)
