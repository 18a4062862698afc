"""Low-rank adaptation: a frozen matrix and two small factors that are trained.

`LoraMatrix` stands in the parameters where the matrix would, as `Int8Matrix` does; a product
with it (`layers.einsum`) is x matrix + scale * (x a) b. For a matrix [in..., out...], `a` is
[in..., r] and `b` is [r, out...]; `b` starts at zero, so training starts from the matrix itself.
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
from neo_jax.model.int8 import SUMMED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraMatrix:
    """matrix + scale * a b, or a stack of them."""

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
        """Those of one layer's parts, for a matrix that is split so."""
        outputs = self.a.ndim - 1  # where they begin
        a, b = P(*partition[:outputs], None), P(None, *partition[outputs:])
        return dataclasses.replace(self, matrix=partition, a=a, b=b)


def product(equation: str, x: jax.Array, weight: LoraMatrix, dtype: str) -> jax.Array:
    """x matrix + scale * (x a) b in `dtype`, where `equation` is of x and the matrix.

    Args:
      equation: its product sums over the last dimension of x and the first of the matrix.
      weight: whole over fsdp. The product's rows are split as x is, its outputs as the matrix.

    At first the change is far below the rounding of bfloat16, of the matrix and of the product, so
    the two terms are added in float32. Gradients are those of products in x's type. Where devices
    have terms of a sum, of the product or of a gradient, they exchange it once, not for each term.
    """
    letters = equation.split(",")[0]
    into = f"{letters},{letters[-1]}r->{letters[:-1]}r"
    out_of = equation.replace(letters[-1], "r")
    of_x, of_weight = jax.tree.map(lambda part: jax.typeof(part).sharding.spec, (x, weight))
    of_y = P(*of_x[:-1], *of_weight.matrix[1:])
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    multiply = functools.partial(jnp.einsum, precision=precision)

    def terms(x, weight, dtype):
        change = multiply(out_of, multiply(into, x, weight.a) * weight.scale, weight.b)
        return multiply(equation, x, weight.matrix, preferred_element_type=dtype) + change

    def summed(part, partition):
        others = _axes(of_x, of_weight.matrix) - _axes(partition)
        return jax.lax.psum(part, tuple(sorted(others)))

    def forward(x, weight):
        return summed(terms(x, weight, jnp.float32).astype(dtype), of_y)

    def backward(x, weight, dy):
        _, gradients = jax.vjp(functools.partial(terms, dtype=x.dtype), x, weight)
        return jax.tree.map(summed, gradients(dy.astype(x.dtype)), (of_x, of_weight))

    given, local = (of_x, of_weight), functools.partial(jax.shard_map, check_vma=False)
    run = jax.custom_vjp(local(forward, in_specs=given, out_specs=of_y))
    pull = local(backward, in_specs=(*given, of_y), out_specs=given)
    run.defvjp(lambda *kept: (run(*kept), kept), lambda kept, dy: pull(*kept, dy))
    return run(x, weight)


def _axes(*partitions: P) -> set[str]:
    """Those of the mesh that partitions name."""
    entries = [entry for partition in partitions for entry in partition if entry]
    return set().union(*(entry if isinstance(entry, tuple) else (entry,) for entry in entries))


def new_factors(params: dict, paths: Sequence[str], rank: int, key: jax.Array) -> dict:
    """{path: {"a", "b"}} as a nested dict, for the matrices at `paths`. Call it inside jit.

    Raises:
      InputError: for a path that is no matrix of a layer.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    found: dict[str, Any] = {}
    for number, path in enumerate(paths):
        stack, _, name = path.rpartition("/")
        if not stack or name not in SUMMED:
            raise InputError(f"lora.targets: {path} is not a matrix of a layer")
        matrix, split = flat[path], 1 + len(SUMMED[name])  # where outputs begin; 0 is the layer
        spec, shape = jax.typeof(matrix).sharding.spec, matrix.shape
        drawn = jax.random.normal(jax.random.fold_in(key, number), (*shape[:split], rank))
        a = drawn / math.sqrt(math.prod(shape[1:split]))
        found[f"{path}/a"] = jax.sharding.reshard(a, P(*spec[:split], None))
        found[f"{path}/b"] = jnp.zeros(
            (shape[0], rank, *shape[split:]), out_sharding=P(None, None, *spec[split:])
        )
    return traverse_util.unflatten_dict(found, sep="/")


def with_lora(factors: dict, params: dict, scale: float) -> dict:
    """The parameters with an `LoraMatrix` wherever there are factors."""
    flat = traverse_util.flatten_dict(params, sep="/")
    pairs = traverse_util.flatten_dict(factors, sep="/")
    for path in {path.rpartition("/")[0] for path in pairs}:
        flat[path] = LoraMatrix(flat[path], pairs[f"{path}/a"], pairs[f"{path}/b"], scale)
    return traverse_util.unflatten_dict(flat, sep="/")


def merge_lora(factors: dict, params: dict, scale: float) -> dict:
    """The parameters with the factors worked in. Call it inside jit."""
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
    whole = layer.matrix.astype(jnp.float32) + jnp.float32(layer.scale) * change
    return whole.astype(layer.matrix.dtype)
