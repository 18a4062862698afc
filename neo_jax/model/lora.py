"""Low-rank adaptation: a frozen matrix and two small factors that are trained.

`Adapted` stands in the parameters where the matrix would (as `Int8Matrix` does), and becomes
matrix + scale * a b when a layer computes. For a matrix [in..., out...], `a` is [in..., r] and `b`
is [r, out...]; `b` starts at zero, so training starts from the matrix itself.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from neo_jax.errors import InputError
from neo_jax.model.cache import STACKS
from neo_jax.model.int8 import SUMMED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """matrix + scale * a b, or a stack of them."""

    matrix: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix.shape

    def __getitem__(self, index) -> "Adapted":
        return self if index is Ellipsis else jax.tree.map(lambda part: part[index], self)

    def astype(self, dtype: str) -> jax.Array:
        """The adapted matrix of one layer, split over the mesh as the matrix is."""
        matrix = self.matrix.astype(dtype)
        change = jnp.tensordot(
            self.a.astype(dtype),
            self.b.astype(dtype),
            axes=1,
            precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
            out_sharding=jax.typeof(self.matrix).sharding.spec,
        )
        return matrix + jnp.asarray(self.scale, dtype) * change


def new_factors(params: dict, paths: Sequence[str], rank: int, key: jax.Array) -> dict:
    """{path: {"a", "b"}} as a nested dict, for the matrices at `paths`. Call it inside jit.

    Raises:
      InputError: for a path that is no matrix of a layer.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    found: dict[str, Any] = {}
    for number, path in enumerate(paths):
        name = path.rpartition("/")[2]
        if path.split("/")[0] not in STACKS or name not in SUMMED:
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


def adapted(params: dict, factors: dict, scale: float) -> dict:
    """The parameters with an `Adapted` wherever there are factors."""
    flat = traverse_util.flatten_dict(params, sep="/")
    pairs = traverse_util.flatten_dict(factors, sep="/")
    for path in {path.rpartition("/")[0] for path in pairs}:
        flat[path] = Adapted(flat[path], pairs[f"{path}/a"], pairs[f"{path}/b"], scale)
    return traverse_util.unflatten_dict(flat, sep="/")


def merged(params: dict, factors: dict, scale: float) -> dict:
    """The parameters with the factors worked in. Call it inside jit."""

    def work_in(leaf):
        if not isinstance(leaf, Adapted):
            return leaf
        in_place = jax.vmap(lambda layer: layer.astype("float32"))
        return in_place(leaf).astype(leaf.matrix.dtype)

    is_adapted = lambda leaf: isinstance(leaf, Adapted)  # noqa: E731
    return jax.tree.map(work_in, adapted(params, factors, scale), is_leaf=is_adapted)
