"""Plans of programs compiled for TPUs that are not here: what is read from them, against counts
made another way. Needs libtpu, the TPU compiler; no TPU."""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import kernel_cycles
from configs import models, tiny_shapes
from configs.pods import PODS
from neo_jax.kernels.intervals import intervals
from neo_jax.model.neo import abstract_params, count_params
from neo_jax.plan import (
    attention,
    cache,
    collectives,
    costs,
    hlo,
    packing,
    pods,
    report,
    search,
    timeline,
)
from neo_jax.plan.__main__ import main
from neo_jax.plan.program import compiled
from neo_jax.plan.result import from_json
from neo_jax.plan.topology import find_topology
from neo_jax.plan.training import plan_training
from neo_jax.sharding import make_mesh
from neo_jax.train import config_file, rules
from neo_jax.train.config import override
from tests.conftest import raises

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)


@pytest.fixture(scope="module", autouse=True)
def kept_apart(tmp_path_factory):
    """A cache of plans of this module's own."""
    before = os.environ.get("NEO_JAX_PLANS")
    os.environ["NEO_JAX_PLANS"] = str(tmp_path_factory.mktemp("plans"))
    yield
    os.environ.pop("NEO_JAX_PLANS")
    if before is not None:
        os.environ["NEO_JAX_PLANS"] = before


# ---- what is read from the text of a program


LAYERS, WIDTH, ROWS = 5, 1024, 512


@functools.cache
def scanned():
    """Text, slice and mesh of a scan over layers whose weights are gathered and scattered."""
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
    totals = costs.read(text, topology, mesh, lambda one: None)
    found = {}
    for one, count, _ in totals.collectives:
        entry = found.setdefault((one.kind, one.axes), [0, 0])
        entry[0] += count
        entry[1] += count * one.bytes
    whole = 2 * WIDTH * WIDTH
    assert found[("all-gather", ("x",))] == [LAYERS, LAYERS * whole / 4]
    assert found[("all-gather", ("y",))] == [LAYERS, LAYERS * whole]
    # The first scatter takes the whole, the second what the first has left; padding may be added.
    for axis, size in (("x", whole), ("y", whole / 4)):
        count, size_found = found[("reduce-scatter", (axis,))]
        assert count == LAYERS
        assert LAYERS * size <= size_found <= 1.1 * LAYERS * size
    assert found[("all-reduce", ("x",))] == [1, 4 * WIDTH]
    assert costs.largest_all_gather(totals)[0] == whole


@needs_compiler
def test_products_are_counted_in_loops():
    text, topology, mesh = scanned()
    totals = costs.read(text, topology, mesh, lambda one: None)
    assert totals.flops == LAYERS * 2 * (2 * ROWS * WIDTH * WIDTH)


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
    totals = costs.read(program.text, topology, mesh, lambda one: None)
    sizes = {}
    for letters, shape in zip(equation.split("->")[0].split(","), shapes, strict=True):
        sizes |= dict(zip(letters, shape, strict=True))
    assert totals.flops == 2 * math.prod(sizes.values())


@needs_compiler
def test_bytes_of_memory_are_those_of_slices_and_results():
    topology = find_topology("v5e:2x2")
    mesh = jax.make_mesh((4,), ("x",), devices=topology.devices)
    layers, shape = 6, (16384, 8192)  # more than VMEM holds
    arguments = (_argument(shape, mesh, P()), _argument((layers, *shape), mesh, P()))

    def run(x, stack):
        return jax.lax.scan(lambda x, layer: (x * layer + 1, None), x, stack)[0]

    program = compiled(lambda: jax.jit(run).lower(*arguments), {})
    totals = costs.read(program.text, topology, mesh, lambda one: None)
    size = 2 * math.prod(shape)
    # Each step reads x and one layer and writes x; what x is copied into first may come to that.
    assert 3 * layers * size <= totals.hbm_bytes <= (3 * layers + 4) * size


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
        assert collectives.members(text, 16) == members, text


def test_waits_are_what_other_work_does_not_hide():
    """1000 cycles beside a gather that takes 1500, then 200 cycles."""
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
            return collectives.Collective("all-gather", ("x",), 4, 1024, 1024, "f32", 768, 1500, "")

    totals = timeline.walk(hlo.parse(text), Network(), 1.0, lambda one: None)
    assert (totals.all_cycles, totals.waits) == (1200, 500)


# ---- packing, attention, FLOPs


@pytest.mark.parametrize("mix", [*packing.MIXES, packing.CAUSAL])
def test_visited_blocks_are_those_with_something_to_see(mix):
    length = 9000 if mix == "video" else 5000
    for row in packing.packed(mix, length, 3):
        key = np.arange(length)
        sees = (key >= row.start[:, None]) & (key < row.end[:, None])
        for queries, keys in ((512, 512), (256, 1024), (1000, 300)):
            some, full = 0, 0
            for i in range(0, length, queries):
                for j in range(0, length, keys):
                    block = sees[i : i + queries, j : j + keys]
                    some += block.any()
                    full += block.all() and block.shape == (queries, keys)
            visits, whole = packing.visited(row, queries, keys)
            assert visits == some
            assert whole == full


def test_packed_rows_follow_the_attention_rule():
    documents = [[("text", 3), ("image", 4), ("text", 2)], [("image", 2), ("text", 1)]]
    row = packing.build(documents, 15)
    t = [[0, 1, 2, 3, 3, 3, 3, 4, 5, 0, 0, 1, 0, 0, 0]]
    segments = [[1] * 9 + [2] * 3 + [0] * 3]
    start, end = intervals(jnp.array(t), jnp.array(segments))
    np.testing.assert_array_equal(row.start, start[0])
    np.testing.assert_array_equal(row.end, end[0])
    assert (row.tokens, row.image_tokens) == (12, 6)
    assert row.keys == 1 + 2 + 3 + 4 * 7 + 8 + 9 + 2 * 2 + 3


def test_rows_are_packed_whole_and_without_documents_that_do_not_fit():
    rows = packing.packed("sft", 8192, 40)
    assert np.mean([row.tokens for row in rows]) > 0.9 * 8192
    assert max(row.tokens for row in rows) <= 8192
    with raises("no document", "100"):
        packing.packed("sft", 100, 1)
    with raises("nonsense", "caption"):
        packing.packed("nonsense", 100, 1)


def test_kernels_take_their_steps_for_every_visit_and_group_of_heads():
    steps = attention.Steps(block_q=512, block_k=512, masked=100, full=80, step=10)
    assert steps.cycles(visits=7, whole=3, groups=8, heads_of_group=2) == 8 * (
        2 * (4 * 100 + 3 * 80) + 7 * 10
    )
    for kernel, chips in attention.table().items():
        assert {"v5e", "v5p", "v6e", "v7x"} <= chips.keys(), kernel


@pytest.mark.parametrize("name", ["NEO_OV_2B", "NEO_OV_9B"])
def test_model_flops_are_six_for_each_weight_and_token(name):
    c = getattr(models, name)
    rows = packing.packed("text", 4096, 2)
    tokens, keys = sum(row.tokens for row in rows), sum(row.keys for row in rows)
    layers = count_params(dataclasses.replace(c, vocab_size=1)) - _other(c)
    width = c.qk_width + c.head_dim
    wanted = 6 * tokens * (layers + c.vocab_size * c.hidden_size)
    wanted += 6 * keys * c.num_layers * c.num_attention_heads * width
    # The norms of layers are the only parameters that this counts and products do not have.
    assert costs.model_flops(c, (".*",), rows) == pytest.approx(wanted, rel=1e-4)


def _other(c) -> int:
    """Parameters outside of layers, with a vocabulary of 1."""
    params = abstract_params(dataclasses.replace(c, vocab_size=1))
    outside = [path for path in rules.paths(params) if not re.match("pre_buffer|post_llm", path)]
    return sum(leaf.size for leaf in jax.tree.leaves(rules.split(params, outside)[0]))


def test_frozen_weights_need_no_gradients():
    c, rows = models.TINY, packing.packed("text", 4096, 1)
    tokens = rows[0].tokens
    whole = costs.model_flops(c, (".*",), rows)
    without = costs.model_flops(c, (r"(?!post_llm/mlp).*",), rows)
    mlp = 3 * c.hidden_size * c.intermediate_size * c.num_post_llm_layers
    assert whole - without == 2 * tokens * mlp


BUNDLES = """
= control target key start
LB: loop body
     0   :  { %s1 = smov.u32 0 }
   0x1 LB: > { %s2 = sld [smem:[#a]] }
   0x2   : > { %9 = sbr.rel (%p1) target = $region4 }
  0x10 PF: > { %s3 = sand.u32 1, %s2 } /* Start/End empty region 4 :: Start region 5 */
  0x12   : > { %10 = sbr.rel (%p2) target = $region8 }
 0x112 PF: > { %s4 = sand.u32 1, %s2 } /* Start/End empty region 8 :: Start region 9 */
 0x114   : > { %11 = sbr.rel (%p3) target = $region12 }
 0x1f4 PF: > { %s5 = sadd.s32 1, %s2 } /* Start/End empty region 12 */
 0x1ff   :  { %12 = sbr.rel (!%p4) target = $region2 }
 0x205   :  { %13 = vsyncpa [#a], 1 }
"""


def test_bundles_of_a_kernel_are_those_of_its_bodies_and_the_rest():
    counts = kernel_cycles.count(BUNDLES.replace("sld [", "sld /* Start region 2 */ ["))
    assert (counts.masked, counts.full) == (0x100, 0xE0)
    assert counts.step == 0x1FF - 0x1 - 0x100 - 0xE0
    with raises("no loop"):
        kernel_cycles.count("   0x1   :  { %s1 = smov.u32 0 }")


# ---- plans


def tiny(*settings: str):
    small = ("model.num_post_llm_layers=1", "data.length=256", "data.rows=4", "mesh=(1,4,1)")
    return override(tiny_shapes.get_config(), [*small, *settings])


@functools.cache
def tiny_plan():
    return plan_training(tiny(), "v5e:2x2", packing="text", name="tiny")


@needs_compiler
def test_a_plan_says_what_the_step_needs():
    plan = tiny_plan()
    params = count_params(tiny().model)
    kinds = plan.memory.kinds
    # 4 bytes each on 4 devices, but for norms and the patch embedding, which are not split.
    assert params < kinds["parameters"] < 2 * params
    assert kinds["optimizer"] == pytest.approx(2 * kinds["parameters"], rel=1e-3)
    assert plan.memory.total == sum(kinds.values())
    assert 0 < plan.memory.spare < 1
    assert not plan.problem
    assert not plan.warnings
    # Forward and backward, and more, as attention computes what it then masks.
    assert plan.executed_flops > plan.model_flops > 0
    assert plan.times.step >= plan.times.compute > plan.model_flops / 197e12
    assert 0 < plan.mfu <= plan.mfu_compute < 1
    # 4 devices are 2 x 2; gradients are reduced over one axis after the other, a sum over both.
    assert {row.axes for row in plan.traffic} == {"fsdp", "fsdp_minor", "fsdp+fsdp_minor"}
    assert from_json(json.loads(json.dumps(plan.to_json()))) == plan


@needs_compiler
def test_a_plan_is_compiled_once(monkeypatch):
    plan = tiny_plan()
    monkeypatch.setattr("neo_jax.plan.training.compiled", None)  # would fail if it were called
    again = plan_training(tiny("workdir=elsewhere"), "v5e:2x2", packing="text", name="tiny")
    assert again.is_cached
    assert dataclasses.replace(again, is_cached=plan.is_cached) == plan
    with pytest.raises(TypeError):
        plan_training(tiny("data.rows=8"), "v5e:2x2", packing="text", name="tiny")


def test_what_a_program_depends_on_is_in_its_key(monkeypatch):
    first = cache.key({"options": {}})
    assert cache.key({"options": {}}) == first
    assert cache.key({"options": {"a": "1"}}) != first
    monkeypatch.setattr(cache, "versions", lambda: {"jax": "other"})
    assert cache.key({"options": {}}) != first


def test_half_a_file_in_the_cache_is_none():
    cache.directory().mkdir(parents=True, exist_ok=True)
    (cache.directory() / "cut.json.gz").write_bytes(b"\x1f\x8b\x08 not the rest")
    assert cache.load("cut") is None
    assert cache.load("never there") is None


@needs_compiler
def test_what_does_not_fit_is_a_plan_that_says_so():
    topology = find_topology("v5e:2x2")
    mesh = jax.make_mesh((4,), ("x",), devices=topology.devices)
    big = _argument((60000, 60000), mesh, P(), jnp.float32)
    program = compiled(lambda: jax.jit(lambda x: jnp.sort(x, axis=1) @ x).lower(big), {})
    assert "15.75G" in program.problem
    plan = dataclasses.replace(tiny_plan(), problem=program.problem, advice="less", times=None)
    text = report.table(plan)
    assert "DOES NOT FIT" in text
    assert "15.75G" in text


def test_arrays_gathered_against_our_will_are_reported():
    class Nothing:
        def lower(self):
            os.write(2, b"W0 spmd] Involuntary full rematerialization. bf16[8,8] of gather\n")
            raise RuntimeError("Ran out of memory: Used 20.1G of 15.75G hbm.")

    program = compiled(Nothing().lower, {})
    assert program.rematerialized == ("bf16[8,8] of gather",)
    assert program.problem == "Used 20.1G of 15.75G"


# ---- the command line


@needs_compiler
def test_command_line_makes_table_json_and_figure(tmp_path, capsys):
    tiny_plan()
    out, png = tmp_path / "plan.json", tmp_path / "plan.png"
    settings = ["model.num_post_llm_layers=1", "--length", "256", "--rows", "4", "--mesh", "1x4x1"]
    command = ["configs/tiny_shapes.py", *settings, "--topology", "v5e:2x2", "--packing", "text"]
    assert main([*command, "--json", str(out), "--png", str(png)]) == 0
    said = capsys.readouterr().out
    for words in ("optimizer", "all-gather", "MFU, at most", "not measurements", "cache"):
        assert words in said
    (plan,) = json.loads(out.read_text())
    assert plan["mfu"] == tiny_plan().mfu
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "line, words",
    [
        ("configs/nothing.py --topology v5e:2x2", ("no such config", "neo_ov_2b_sft")),
        ("configs/tiny_shapes.py", ("--topology", "--pod")),
        ("configs/tiny_shapes.py --topology v9:2x2", ("v9", "v6e")),
        ("configs/tiny_shapes.py --topology big", ("v5e:16x16",)),
        ("configs/tiny_shapes.py --topology v5e:2x2 --mesh 1x3x1", ("1x3x1", "4 devices")),
        ("configs/tiny_shapes.py --topology v5e:2x2 --mesh 2x1", ("2x1", "1x256x1")),
        ("configs/tiny_shapes.py --topology v5e:2x2 --mesh 1x4x1 --rows 6", ("6 rows", "4")),
        ("configs/tiny_shapes.py data.lenth=8 --topology v5e:2x2", ("length",)),
        ("configs/tiny_shapes.py --pod v5e-16", ("pods.py", "mesh=")),
        ("configs/neo_ov_2b_sft.py --pod v5e-17", ("v5e-17", "v5e-16")),
        ("configs/tiny_shapes.py --topology v5e:2x2 --mesh 1x4x1 --option x", ("NAME=VALUE",)),
        (
            "configs/tiny_shapes.py --topology v5e:2x2 --mesh 1x4x1 --packing text --length 512 "
            "--option xla_nonsense=1",
            ("compiler", "xla_nonsense"),
        ),
    ],
)
@needs_compiler
def test_bad_input_is_one_line(line, words, capsys):
    assert main(line.split()) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    for word in words:
        assert word in said


def test_a_missing_compiler_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    find_topology.cache_clear()
    assert main(["configs/tiny_shapes.py", "--topology", "v5e:4x8"]) == 2
    assert "neo-ov-jax[plan]" in capsys.readouterr().err


@needs_compiler
def test_candidates_keep_the_step_and_leave_out_what_cannot_be():
    c = tiny("data.rows=8")
    found = list(search.candidates(c, c.model, "v5e:2x2"))
    meshes = {one.mesh for one, _ in found}
    assert (1, 4, 1) in meshes
    assert (1, 2, 2) in meshes
    assert all(size[2] <= c.model.num_key_value_heads for size in meshes)
    assert {one.data.rows for one, _ in found} == {8}
    assert {one.micro_batches for one, _ in found} == {1, 2, 4}
    by_micro = {one.micro_batches: least for one, least in found if one.remat == "full"
                and one.mesh == (1, 4, 1)}  # fmt: skip
    assert by_micro[1] > by_micro[2]


@needs_compiler
def test_a_search_ranks_what_fits_and_outlives_what_fails(monkeypatch, capsys, tmp_path):
    tiny_plan()
    run, out = subprocess.run, tmp_path / "plans.json"

    def dies_at_full(command, **options):
        if "full" in command:
            return subprocess.CompletedProcess(command, -6, "", "")
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", dies_at_full)
    monkeypatch.setattr(search, "REMAT_POLICIES", ("none", "full"))
    monkeypatch.setattr(search, "MICRO_BATCHES", (1,))
    settings = ["model.num_post_llm_layers=1", "--length", "256", "--rows", "4", "--mesh", "1x4x1"]
    command = ["configs/tiny_shapes.py", *settings, "--topology", "v5e:2x2", "--packing", "text"]
    assert main([*command, "--search", "--json", str(out)]) == 0
    said = capsys.readouterr()
    assert "2 candidates, 0 cannot fit; compiling 2" in said.err
    best, worst = said.out.split("\n")[1:3]
    assert "none" in best
    assert "ended with -6" in worst
    assert [plan["problem"] for plan in json.loads(out.read_text())] == ["", "ended with -6"]


@needs_compiler
def test_rings_have_twice_the_bandwidth_of_lines():
    for name, count, links in (
        ("v5e:16x16", 16, 2),  # a whole side of a pod is a ring
        ("v5e:4x4", 4, 1),
        ("v5e:16x16", 256, 4),
        ("v5p:4x4x4", 4, 2),
        ("v5e:16x16", 8, 1),
    ):
        topology = find_topology(name)
        along = sorted(topology.devices, key=lambda device: tuple(reversed(device.coords)))
        assert topology.bandwidth(along[:count]) == links * topology.chip.link_bandwidth


@needs_compiler
def test_meshes_lie_along_the_sides_of_their_slice():
    for name, sizes, wanted in (
        ("v5e:16x16", (1, 256, 1), (1, 16, 16, 1, 1)),
        ("v5p:4x4x4", (1, 64, 1), (1, 16, 4, 1, 1)),  # 8 x 8 would cut a side
        ("v5e:16x16", (1, 128, 1, 2), (1, 16, 8, 2, 1)),
        ("v5e:4x4", (1, 8, 2), (1, 4, 2, 1, 2)),
    ):
        mesh = find_topology(name).mesh(sizes)
        assert tuple(mesh.shape.values()) == wanted
        along = [device.coords for device in mesh.devices[0, :, 0, 0, 0]]
        sides = sum(len(set(axis)) > 1 for axis in zip(*along, strict=True))
        assert sides == (2 if name == "v5p:4x4x4" else 1)


@needs_compiler
def test_data_goes_along_slices():
    described = topologies.get_topology_desc("v5e:4x4", platform="tpu", num_slices=2)
    mesh = make_mesh((2, 16, 1), described.devices)
    assert [{one.slice_index for one in part.flat} for part in mesh.devices] == [{0}, {1}]
    with raises("data", "2 slices"):
        make_mesh((1, 32, 1), described.devices)


def test_every_pod_has_settings_that_its_config_takes():
    for (name, pod), settings in PODS.items():
        path = f"configs/{name}.py"
        config = config_file.on_pod(config_file.load(path).get_config(), path, pod)
        assert config == override(config_file.load(path).get_config(), settings)


def test_the_table_of_pods_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    plan = tiny_plan().to_json() if importlib.util.find_spec("libtpu") else None
    made = []

    def row(config, pod, anew):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append((config, pod))
        return {"plan": plan} if plan else {"error": "nothing"}

    monkeypatch.setattr(pods, "_row", row)
    monkeypatch.setattr(pods, "find_topology", lambda pod: None)
    table = tmp_path / "pods.md"
    with pytest.raises(KeyboardInterrupt):
        pods.write_table(str(table), "2b_sft v5e")
    first, made[:] = list(made), []
    with pytest.raises(KeyboardInterrupt):
        pods.write_table(str(table), "2b_sft v5")
    assert not set(first) & set(made)
    assert len(json.loads(table.with_suffix(".json").read_text())) == 4
