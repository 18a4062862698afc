"""The model's shared layers, where they differ from their plain definition."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from helpers.golden import needs_compiler
from neo_jax.model import layers
from neo_jax.plan import costs
from neo_jax.plan.program import compiled
from neo_jax.plan.topology import find_topology


def test_the_gradient_of_a_row_taken_often_is_exact():
    """Two thousand summands of one size and sign: a sum in bfloat16 stops at the 256th."""
    rng = np.random.default_rng(0)
    table = jnp.zeros((8, 16), jnp.bfloat16)
    index = np.where(rng.random(2500) < 0.8, 3, rng.integers(0, 8, 2500))
    weight = rng.uniform(0.5, 1.5, (2500, 16)).astype(np.float32)

    def total(table):
        return jnp.sum(weight * layers.take_rows(table, index, "bfloat16").astype(jnp.float32))

    found = jax.jit(jax.grad(total))(table)
    wanted = np.zeros((8, 16), np.float32)
    np.add.at(wanted, index, np.float32(jnp.bfloat16(weight)))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(found), wanted, rtol=2**-8)


@needs_compiler
def test_one_decoded_row_is_a_product_of_the_matrix_unit():
    """For a single row, XLA:TPU would use the vector unit, at half the speed."""
    topology = find_topology("v5e:2x2")
    mesh = jax.make_mesh(
        (1,), ("x",), devices=topology.devices[:1], axis_types=(AxisType.Explicit,)
    )
    sharding = NamedSharding(mesh, P())
    x, weight = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
        for shape in ((1, 1, 512), (512, 1024))
    )

    def flops(product):
        with jax.set_mesh(mesh):
            program = compiled(lambda: jax.jit(product).lower(x, weight), {})
        return costs.read(program.text, topology, mesh, lambda one, where: None).flops

    plain = flops(lambda x, weight: jnp.einsum("btd,df->btf", x, weight))
    assert plain == 0
    assert flops(lambda x, w: layers.einsum("btd,df->btf", x, w)) == 2 * 2 * 512 * 1024
