"""Weight-only int8: half the bytes of bfloat16, so that a 9B model fits a 16 GB device.

An `Int8Matrix` takes the place of an array in the parameters. It is int8 in memory and during the
all-gather. A product (`layers.einsum`) takes the integers, which bfloat16 holds exactly, and scales
the result. The embedding lookup dequantizes only the rows that it takes. Norms, biases and the
patch embedding are not quantized.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

# The matrices that become int8, and their contracting dimensions in a product, from the last.
CONTRACTING_DIMS = {
    "q_t_dnh": (-3,),
    "q_hw_dnh": (-3,),
    "k_t_dkh": (-3,),
    "k_hw_dkh": (-3,),
    "v_dkh": (-3,),
    "o_nhd": (-3, -2),
    "gate_df": (-2,),
    "up_df": (-2,),
    "down_fd": (-2,),
    "embed": (-1,),
    "lm_head": (-1,),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Matrix:
    """The matrix values * scale, or a stack of such matrices.

    Attributes:
      values: int8, of the matrix's shape.
      scale: float32, one per output channel: shaped as `values`, but 1 in contracting dimensions.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __getitem__(self, index) -> "Int8Matrix":
        """A layer of a stack, or rows of a table."""
        return jax.tree.map(lambda part: part[index], self)

    def astype(self, dtype: str) -> jax.Array:
        """Dequantized: for the few rows of a lookup, not for a whole matrix."""
        return (self.values * self.scale).astype(dtype)


def as_int8(params: dict) -> dict:
    """The shapes of `abstract_params` with the matrices of CONTRACTING_DIMS as `Int8Matrix`.

    Values are split over the mesh as the matrix was, scales as its output channels.
    """

    def convert(path, leaf):
        if path[-1].key not in CONTRACTING_DIMS:
            return leaf
        contracting = [axis + len(leaf.shape) for axis in CONTRACTING_DIMS[path[-1].key]]
        shape = [1 if axis in contracting else size for axis, size in enumerate(leaf.shape)]
        partition = [
            None if i in contracting else name for i, name in enumerate(leaf.sharding.spec)
        ]
        sharding = NamedSharding(leaf.sharding.mesh, P(*partition))
        return Int8Matrix(
            jax.ShapeDtypeStruct(leaf.shape, jnp.int8, sharding=leaf.sharding),
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding),
        )

    return jax.tree_util.tree_map_with_path(convert, params)
