"""Plans read the right numbers from compiled programs: work, collectives, bytes, waits.

Needs libtpu, the TPU compiler, but no TPU.
"""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from helpers.golden import needs_compiler
from neo_jax.plan import costs, hlo, network, timeline
from neo_jax.plan.program import compiled
from neo_jax.plan.topology import find_topology

LAYERS, WIDTH, ROWS = 5, 1024, 512


@functools.cache
def scanned():
    """A scan over layers whose weights are gathered and gradients scattered: text, slice, mesh."""
    topology = find_topology("v5e:4x4")
    mesh = jax.make_mesh((4, 4), ("x", "y"), devices=topology.devices)

    def run(x, w):
        def body(x, w):
            for axis in ("x", "y"):
                w = jax.lax.all_gather(w, axis, axis=0, tiled=True)
            x = jnp.tanh(x @ w)
            gradient = x.T @ x
            for axis in ("x", "y"):
                gradient = jax.lax.psum_scatter(gradient, axis, scatter_dimension=0, tiled=True)
            return x, gradient

        x, gradients = jax.lax.scan(body, x, w)
        return jax.lax.psum(jnp.sum(x.astype(jnp.float32), axis=0), "x"), gradients

    split = P(None, ("x", "y"), None)
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(P(("x", "y"), None), split), out_specs=(P("y"), split)
    )
    arguments = (
        _argument((16 * ROWS, WIDTH), mesh, P(("x", "y"), None)),
        _argument((LAYERS, WIDTH, WIDTH), mesh, split),
    )
    program = compiled(lambda: jax.jit(mapped).lower(*arguments), {})
    return program.text, topology, mesh


def _argument(shape, mesh, partition, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition))


@needs_compiler
def test_loops_run_as_often_as_the_scan_is_long():
    module = hlo.parse(scanned()[0])
    loops = [
        module.trips(one, where)
        for where in module.computations.values()
        for one in where.instructions
        if one.op == "while"
    ]
    assert LAYERS in loops


@needs_compiler
def test_collectives_are_counted_by_kind_axis_and_bytes():
    text, topology, mesh = scanned()
    totals = costs.read(text, topology, mesh, lambda one, where: None)
    found = {}
    for one, count, _ in totals.collectives:
        entry = found.setdefault((one.kind, one.axes), [0, 0])
        entry[0] += count
        entry[1] += count * one.bytes
    whole = 2 * WIDTH * WIDTH
    assert found[("all-gather", ("x",))] == [LAYERS, LAYERS * whole / 4]
    assert found[("all-gather", ("y",))] == [LAYERS, LAYERS * whole]
    # The first scatter takes the whole gradient, the second a quarter; padding may be added.
    for axis, size in (("x", whole), ("y", whole / 4)):
        count, size_found = found[("reduce-scatter", (axis,))]
        assert count == LAYERS
        assert LAYERS * size <= size_found <= 1.1 * LAYERS * size
    assert found[("all-reduce", ("x",))] == [1, 4 * WIDTH]
    assert costs.largest_all_gather(totals)[0] == whole


@needs_compiler
def test_products_are_counted_in_loops():
    text, topology, mesh = scanned()
    totals = costs.read(text, topology, mesh, lambda one, where: None)
    assert totals.flops == LAYERS * 2 * (2 * ROWS * WIDTH * WIDTH)


@needs_compiler
def test_branches_count_as_often_as_they_are_taken():
    topology = find_topology("v5e:2x2")
    mesh = jax.make_mesh((4,), ("x",), devices=topology.devices)

    def some(which, x, *weights):
        branches = [lambda x, w=w: jnp.sum(x @ w, dtype=jnp.float32) for w in weights]
        return jax.lax.switch(which, branches, x)

    shapes = [(256, 256), *((256, 256 << power) for power in range(3))]
    arguments = [_argument((), mesh, P(), jnp.int32), *(_argument(s, mesh, P()) for s in shapes)]
    program = compiled(lambda: jax.jit(some).lower(*arguments), {})
    of_branch = [2 * 256 * 256 * (256 << power) for power in range(3)]
    for shares, wanted in (
        (None, of_branch[0]),  # the quickest
        ([0.5, 0.0, 0.5], (of_branch[0] + of_branch[2]) / 2),
    ):
        options = {"branches": lambda one, shares=shares: shares}
        totals = costs.read(program.text, topology, mesh, lambda one, where: None, **options)
        assert totals.flops == wanted


@needs_compiler
@pytest.mark.parametrize(
    "equation, shapes",
    [
        ("btd,dnj->btnj", ((2, 256, 512), (512, 8, 128))),
        ("btnh,nhd->btd", ((2, 256, 8, 128), (8, 128, 512))),
        ("btkgj,bskj->bkgts", ((2, 128, 4, 2, 128), (2, 128, 4, 128))),
        ("bkgts,bskh->btkgh", ((2, 4, 2, 128, 128), (2, 128, 4, 128))),
    ],
)
def test_products_of_heads_are_counted(equation, shapes):
    topology = find_topology("v5e:2x2")
    mesh = jax.make_mesh((4,), ("x",), devices=topology.devices)
    arguments = [_argument(shape, mesh, P()) for shape in shapes]
    lower = jax.jit(lambda a, b: jnp.einsum(equation, a, b)).lower
    program = compiled(lambda: lower(*arguments), {})
    totals = costs.read(program.text, topology, mesh, lambda one, where: None)
    sizes = {}
    for letters, shape in zip(equation.split("->")[0].split(","), shapes, strict=True):
        sizes |= dict(zip(letters, shape, strict=True))
    assert totals.flops == 2 * math.prod(sizes.values())


@needs_compiler
def test_bytes_of_memory_are_those_of_slices_and_results():
    topology = find_topology("v5e:2x2")
    mesh = jax.make_mesh((4,), ("x",), devices=topology.devices)
    layers, shape = 6, (16384, 8192)  # larger than VMEM
    arguments = (_argument(shape, mesh, P()), _argument((layers, *shape), mesh, P()))

    def run(x, stack):
        return jax.lax.scan(lambda x, layer: (x * layer + 1, None), x, stack)[0]

    program = compiled(lambda: jax.jit(run).lower(*arguments), {})
    totals = costs.read(program.text, topology, mesh, lambda one, where: None)
    size = 2 * math.prod(shape)
    # Each step reads x and a layer, and writes x. Copies of x before the loop may come on top.
    assert 3 * layers * size <= totals.hbm_bytes <= (3 * layers + 4) * size


@needs_compiler
def test_what_is_written_in_place_is_counted_by_what_is_new():
    topology = find_topology("v5e:2x2")
    mesh = jax.make_mesh((4,), ("x",), devices=topology.devices)
    stack = _argument((6, 8, 2048, 8192), mesh, P())
    new, place = _argument((8, 8192), mesh, P()), _argument((8,), mesh, P(), jnp.int32)

    def run(stack, new, place):
        def write(stack, layer):
            return stack.at[layer, jnp.arange(8), place].set(new), None

        return jax.lax.scan(write, stack, jnp.arange(6))[0]

    program = compiled(lambda: jax.jit(run, donate_argnums=0).lower(stack, new, place), {})
    totals = costs.read(program.text, topology, mesh, lambda one, where: None)
    assert 0 < totals.hbm_bytes < 2 * 2048 * 8192  # not a slot of a layer


def test_groups_of_devices_are_read_in_every_spelling():
    spelled = {
        "replica_groups={{0,4,8,12},{1,5,9,13}}": [0, 4, 8, 12],
        "replica_groups=[4,4]<=[4,4]T(1,0)": [0, 4, 8, 12],
        "replica_groups=[4,4]<=[16]": [0, 1, 2, 3],
        "replica_groups=mesh['a'=4,'b'=4] {'a'}": [0, 4, 8, 12],
        "replica_groups=mesh['a'=4,'b'=4] {'a','b'}": list(range(16)),
        "replica_groups=mesh['a'=16] {'a':(4)2}": [0, 2],
        "source_target_pairs={{0,4},{4,8}}": [0, 4],
    }
    for text, members in spelled.items():
        assert network.members(text, 16) == members, text


def test_waits_are_what_other_work_does_not_hide():
    """1000 cycles run beside an all-gather that takes 1500, then 200 cycles after it."""
    text = """HloModule m, is_scheduled=true

ENTRY %main (p: f32[64]) -> f32[256] {
  %p = f32[64]{0} parameter(0)
  %s = (f32[64]{0}, f32[256]{0}) all-gather-start(%p), replica_groups={{0,1,2,3}}, dimensions={0}
  %a = f32[64]{0} add(%p, %p), backend_config={"estimated_cycles":"1000"}
  %d = f32[256]{0} all-gather-done(%s)
  ROOT %b = f32[256]{0} add(%d, %d), backend_config={"estimated_cycles":"200"}
}
"""

    class Network:
        def collective(self, one, is_scattered=False):
            return network.Collective("all-gather", ("x",), 4, 1024, 1024, "f32", 768, 1500, "")

    totals = timeline.walk(hlo.parse(text), Network(), 1.0, lambda one, where: None)
    assert (totals.all_cycles, totals.waits) == (1200, 500)
