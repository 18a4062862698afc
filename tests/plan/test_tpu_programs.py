"""The TPU compiler's programs of our kernels, a step and decoding. Needs libtpu, no TPU."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from helpers.golden import needs_compiler
from neo_jax.configs import tiny_shapes
from neo_jax.kernels.interval_attention import interval_attention
from neo_jax.model_config import ModelConfig
from neo_jax.plan.chips import CHIPS
from neo_jax.plan.serving import plan_serving
from neo_jax.plan.topology import find_topology
from neo_jax.plan.training import plan_training

pytestmark = needs_compiler

MODEL = ModelConfig(
    hidden_size=512,
    intermediate_size=1024,
    num_pre_buffer_layers=0,
    num_post_llm_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
    vocab_size=2048,
    dtype="bfloat16",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slice_", "length", "kernels"),
    [
        ("v5e:2x2", 2048, {"forward", "backward"}),
        ("v5p:2x2x1", 8192, {"forward", "backward"}),
        ("v6e:2x2", 32768, {"forward", "backward_queries", "backward_keys"}),
    ],
)
def test_attention_is_compiled_for_tpus(slice_, length, kernels):
    sharding = SingleDeviceSharding(find_topology(slice_).devices[0])

    def loss(q, k, v, start, end):
        return jnp.sum(interval_attention(q, k, v, start, end, 0.1).astype(jnp.float32))

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    heads = (array(1, length, 4, 256), array(1, length, 2, 256), array(1, length, 2, 128))
    bounds = [array(1, length, dtype=jnp.int32)] * 2
    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*heads, *bounds)
    for kernel in kernels:
        assert f'"interval_attention_{kernel}"' in lowered.as_text()
    options = {"xla_tpu_offload_gather_to_sparsecore": "false"} if "v5e" not in slice_ else None
    memory = lowered.compile(compiler_options=options).memory_analysis()
    scores = 4 * 4 * length**2
    assert memory.temp_size_in_bytes < scores / 8


@pytest.mark.slow
def test_kernels_keep_to_their_budget():
    """Instruction bundles of one chip; `make tpu` checks all."""
    command = [sys.executable, "-m", "benchmarks.kernel_cycles", "--chips", "v5e"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.slow
def test_gradients_of_weights_are_scattered():
    config = dataclasses.replace(tiny_shapes.get_config(), model=MODEL, mesh=(1, 16, 1))
    data = dataclasses.replace(config.data, length=2048, rows=16, num_patches=0)
    config = dataclasses.replace(config, data=data, dtype="bfloat16", remat="full")
    plan = plan_training(config, "v5e:4x4", packing="caption", with_flags=False, use_cache=False)
    assert not plan.problem
    assert not plan.warnings
    assert plan.times.kernels > 0
    scattered = [one for one in plan.traffic if one.kind == "reduce-scatter"]
    matrices = 2 * 4 * (3 * 512 * 1024 + 512 * (2 * 4 * 128 + 512 + 2 * 3 * 128))
    assert sum(one.bytes for one in scattered) > matrices
    # All-reduced are only norms, biases and the first matrix of the patch embedding: not split.
    assert plan.all_reduced < 4 * (768 * 1024 + 100_000)


@pytest.mark.slow
@pytest.mark.parametrize("length", [4096, 8192])  # all scores at once, and by the kernel
def test_a_prefill_is_counted_with_the_keys_that_it_needs(length):
    prefill, _ = plan_serving(
        MODEL,
        "v5e:2x2",
        mesh=(2, 1, 2),
        slots=2,
        max_length=length,
        prefill=length,
        with_flags=False,
        use_cache=False,
    )
    executed = prefill.times.products * CHIPS["v5e"].flops
    assert prefill.model_flops < executed < 1.7 * prefill.model_flops


@pytest.mark.slow
@pytest.mark.parametrize("slice_", ["v5e:2x2", "v6e:2x2", "v7x:2x2x1"])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_no_program_copies_the_pool(kv_dtype, slice_):
    plans = plan_serving(
        MODEL,
        slice_,
        mesh=(-1, 1, 2),
        slots=8,
        max_length=16384,
        prefill=512,
        kv_dtype=kv_dtype,
        with_flags=False,
        use_cache=False,
    )
    assert not any(plan.problem for plan in plans)
    for plan in plans:
        assert not plan.notes["they are"]
        assert not plan.notes["kernels not counted"]
    decode = plans[1]
    assert decode.times.kernels > 0
    kinds = decode.memory.kinds
    assert kinds["temporaries"] < 0.1 * kinds["keys and values"]
