"""Plans and their command line, for TPU slices that you have not rented. Needs libtpu, no TPU."""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from helpers.commands import plan as main
from helpers.golden import ROOT, needs_compiler, raises
from neo_jax.configs import tiny_shapes
from neo_jax.model.neo import count_params
from neo_jax.plan import compile_cache, plan_report, search
from neo_jax.plan.program import compiled
from neo_jax.plan.result import from_json
from neo_jax.plan.topology import find_topology
from neo_jax.plan.training import plan_training
from neo_jax.sharding import make_mesh
from neo_jax.train.train_config import override


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """A cache of compiled programs for this module alone."""
    before = os.environ.get("NEO_JAX_PLANS")
    os.environ["NEO_JAX_PLANS"] = str(tmp_path_factory.mktemp("plans"))
    yield
    os.environ.pop("NEO_JAX_PLANS")
    if before is not None:
        os.environ["NEO_JAX_PLANS"] = before


def _argument(shape, mesh, partition, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition))


def tiny(*settings: str):
    small = ("model.num_post_llm_layers=1", "data.length=256", "data.rows=4", "mesh=(1,4,1)")
    return override(tiny_shapes.get_config(), [*small, *settings])


@functools.cache
def tiny_plan():
    return plan_training(tiny(), "v5e:2x2", packing="text", name="tiny")


@pytest.mark.slow
@needs_compiler
def test_a_plan_says_what_the_step_needs():
    plan = tiny_plan()
    params = count_params(tiny().model)
    kinds = plan.memory.kinds
    # 4 bytes each on 4 devices; norms and the patch embedding are not split.
    assert params < kinds["parameters"] < 2 * params
    assert kinds["optimizer"] == pytest.approx(2 * kinds["parameters"], rel=1e-3)
    assert plan.memory.total == sum(kinds.values())
    assert 0 < plan.memory.spare < 1
    assert not plan.problem
    assert not plan.warnings
    # More than forward and backward, since attention also computes scores that it then masks.
    assert plan.executed_flops > plan.model_flops > 0
    assert plan.times.step >= plan.times.compute > plan.model_flops / 197e12
    assert 0 < plan.mfu <= plan.mfu_compute < 1
    # 4 devices are 2 x 2; gradients are reduced over one axis after the other, a sum over both.
    assert {row.axes for row in plan.traffic} == {"fsdp", "fsdp_minor", "fsdp+fsdp_minor"}
    assert from_json(json.loads(json.dumps(plan.to_json()))) == plan


@needs_compiler
def test_a_plan_is_compiled_once(monkeypatch):
    plan = tiny_plan()
    monkeypatch.setattr("neo_jax.plan.compile_cache.compiled", None)  # a call would fail
    again = plan_training(tiny("workdir=elsewhere"), "v5e:2x2", packing="text", name="tiny")
    assert again.is_cached
    assert dataclasses.replace(again, is_cached=plan.is_cached) == plan
    with pytest.raises(TypeError):
        plan_training(tiny("data.rows=8"), "v5e:2x2", packing="text", name="tiny")


def test_what_a_program_depends_on_is_in_its_key(monkeypatch):
    first = compile_cache.key({"options": {}})
    assert compile_cache.key({"options": {}}) == first
    assert compile_cache.key({"options": {"a": "1"}}) != first
    with monkeypatch.context() as changed:
        changed.setenv("LIBTPU_INIT_ARGS", "--xla_a=1")
        assert compile_cache.key({"options": {}}) != first
    monkeypatch.setattr(compile_cache, "versions", lambda: {"jax": "other"})
    assert compile_cache.key({"options": {}}) != first


def test_half_a_file_in_the_cache_is_none():
    compile_cache.directory().mkdir(parents=True, exist_ok=True)
    (compile_cache.directory() / "cut.json.gz").write_bytes(b"\x1f\x8b\x08 not the rest")
    assert compile_cache.load("cut") is None
    assert compile_cache.load("never there") is None


@needs_compiler
def test_what_does_not_fit_is_a_plan_that_says_so():
    topology = find_topology("v5e:2x2")
    mesh = jax.make_mesh((4,), ("x",), devices=topology.devices)
    big = _argument((60000, 60000), mesh, P(), jnp.float32)
    program = compiled(lambda: jax.jit(lambda x: jnp.sort(x, axis=1) @ x).lower(big), {})
    assert "15.75G" in program.problem
    plan = dataclasses.replace(tiny_plan(), problem=program.problem, advice="less", times=None)
    text = plan_report.table(plan)
    assert "DOES NOT FIT" in text
    assert "15.75G" in text


def test_arrays_gathered_against_our_will_are_reported():
    class Failing:
        def lower(self):
            os.write(2, b"W0 spmd] Involuntary full rematerialization. bf16[8,8] of gather\n")
            raise RuntimeError("Ran out of memory: Used 20.1G of 15.75G hbm.")

    program = compiled(Failing().lower, {})
    assert program.rematerialized == ("bf16[8,8] of gather",)
    assert program.problem == "Used 20.1G of 15.75G"


@needs_compiler
def test_command_line_makes_table_json_and_figure(tmp_path, capsys):
    tiny_plan()
    out, png = tmp_path / "plan.json", tmp_path / "plan.png"
    settings = ["model.num_post_llm_layers=1", "--length", "256", "--rows", "4", "--mesh", "1x4x1"]
    command = ["configs/tiny_shapes.py", *settings, "--topology", "v5e:2x2", "--packing", "text"]
    assert main([*command, "--json", str(out), "--png", str(png)]) == 0
    printed = capsys.readouterr().out
    for words in ("optimizer", "all-gather", "MFU, at most", "not measurements", "cache"):
        assert words in printed
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
        ("configs/tiny_shapes.py --topology v5e:2x2 --mesh 1x4x1 --rows 6", ("rows is 6", "4")),
        ("configs/tiny_shapes.py data.lenth=8 --topology v5e:2x2", ("length",)),
        ("configs/tiny_shapes.py --topology v5e:2x2 data.lenth=8", ("length",)),
        (
            "configs/tiny_shapes.py --topology v5e:2x2 --mesh 1x2x1x2 --length 511 --rows 2",
            ("length 511", "multiples of 2"),
        ),
        ("configs/tiny_shapes.py --topology v5e:2x2 --serve --search", ("--serve", "--search")),
        ("--pods nowhere/pods.md --json plan.json", ("--pods", "--json")),
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
    error = re.sub(r"^compiling .*\n", "", capsys.readouterr().err.strip())
    assert "\n" not in error
    for word in words:
        assert word in error


def test_bad_input_of_the_module_is_one_line_too():
    command = [sys.executable, "-m", "neo_jax.plan", "tiny_shapes"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 2
    assert ended.stderr.startswith("neo_jax.plan: name a config and either --topology or --pod")
    assert ended.stderr.count("\n") == 1


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
    on_one = {(one.micro_batches, one.remat): least for one, least in found
              if one.mesh == (1, 4, 1)}  # fmt: skip
    assert {micro for micro, _ in on_one} == {1, 2}
    assert on_one[1, "full"] > on_one[2, "full"]
    assert on_one[1, "full"] < on_one[1, "attention"] < on_one[1, "mlp"] < on_one[1, "products"]
    fixed = list(search.candidates(c, c.model, "v5e:2x2", remat="gate", micro_batches=2))
    assert {(one.remat, one.micro_batches) for one, _ in fixed} == {("gate", 2)}


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
    settings = ["model.num_post_llm_layers=1", "--length", "256", "--rows", "4", "--mesh", "1x4x1"]
    command = ["configs/tiny_shapes.py", *settings, "--topology", "v5e:2x2", "--packing", "text"]
    command += ["--micro-batches", "1"]
    assert main([*command, "--search", "--json", str(out)]) == 0
    printed = capsys.readouterr()
    assert "2 candidates, 0 cannot fit; compiling 2" in printed.err
    best, worst = printed.out.split("\n")[1:3]
    assert "none" in best
    assert "ended with -6" in worst
    assert [plan["problem"] for plan in json.loads(out.read_text())] == ["ended with -6", ""]


@needs_compiler
def test_rings_have_twice_the_bandwidth_of_lines():
    for name, count, links in (
        ("v5e:16x16", 16, 2),  # a whole side of a pod is a ring
        ("v5e:4x4", 4, 1),
        ("v5e:16x16", 256, 4),
        ("v5p:4x4x4", 4, 2),
        ("v5p:2x4x4", 8, 2),  # less than a cube: no rings
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
