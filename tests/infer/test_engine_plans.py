"""What an engine settles before it answers: memory, shapes, a request's tokens and pixels."""

import os
import types

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.engine_requests import image, mixed_requests, model_loader
from helpers.golden import GOLDEN, arrays, load_case, raises, read_json
from helpers.scheduler_model import make_sequence, new_model
from neo_jax import Request, Sampling
from neo_jax.configs.models import NEO_OV_2B, NEO_OV_9B
from neo_jax.infer import memory, programs
from neo_jax.infer.buckets import Shapes
from neo_jax.infer.memory import choose_pool
from neo_jax.infer.scheduler import Scheduler
from neo_jax.sharding import make_mesh
from neo_jax.weights.place import param_target

GIB = 2**30


def test_memory_is_checked_before_anything_is_compiled():
    neo = load_case("generate")
    arguments = (neo.config, neo.params, neo.mesh, "float32")
    with raises("a pool of 4000 tokens needs .* GB", "lower max_length or pool_tokens", "int8"):
        choose_pool(*arguments, pool_tokens=4000, free_bytes=10**6)
    with raises("a pool of 4000 tokens needs"):  # one sequence must fit
        choose_pool(*arguments, max_length=4000, free_bytes=10**6)
    with raises("max_length 50000 exceeds the model's context of 40960"):
        choose_pool(*arguments, max_length=50000)
    with raises("kv_dtype 'int4'"):
        neo.engine(kv_dtype="int4")
    for name in ("slots", "prefill_budget", "workers", "pool_tokens", "max_length", "block_size"):
        with raises(f"{name} must be 1 or more"):
            neo.engine(**{name: 0})


@pytest.mark.parametrize("meminfo", ["MemFree: 9 kB\nMemAvailable:   1000000 kB\n", "", None])
def test_free_memory_of_a_host(meminfo, monkeypatch, tmp_path):
    """On Linux with the pages of files that were read; elsewhere all but the parameters."""

    def sysconf(name):
        if name not in (pages := {"SC_PHYS_PAGES": 10**6, "SC_PAGE_SIZE": 4096}):
            raise ValueError("unrecognized configuration name")  # as macOS of free pages
        return pages[name]

    monkeypatch.setattr(os, "sysconf", sysconf)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    if meminfo is not None:
        (tmp_path / "meminfo").write_text(meminfo)
    neo = load_case("generate")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(neo.params))
    free = 1000000 * 1024 if meminfo else 10**6 * 4096 - held
    with raises(f"{free * 0.85 / 1e9:.2f} GB are free"):
        choose_pool(neo.config, neo.params, neo.mesh, "float32", pool_tokens=10**9)


def accelerator(num_devices=1):
    """What `choose_pool` reads of a mesh."""
    shape = dict(make_mesh((1, 1, 1)).shape) | {"tensor": num_devices}
    devices = np.array([types.SimpleNamespace(platform="tpu")] * num_devices)
    return types.SimpleNamespace(devices=devices, size=num_devices, shape=shape)


def parameter_bytes(config, weights):
    target = param_target(config, make_mesh((1, 1, 1)), "bfloat16", weights)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(target))


# Memory that a program may have, in GiB; on GPUs JAX takes 75 % of what the card has.
DEVICES = {"v5e": 15.75, "T4": 0.75 * 14.5, "L4": 0.75 * 22.0}
MODELS = {
    "2B": (NEO_OV_2B, None, "bfloat16"),
    "2B int8": (NEO_OV_2B, "int8", "bfloat16"),
    "9B int8": (NEO_OV_9B, "int8", "int8"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", MODELS)
def test_the_default_evaluation_fits_a_small_device(device, model):
    """A prompt of 3000 tokens and 4096 new ones; several usual rows run at once."""
    config, weights, kv_dtype = MODELS[model]
    free = int(DEVICES[device] * GIB) - parameter_bytes(config, weights)
    pool = choose_pool(config, {}, accelerator(), kv_dtype, free_bytes=free)
    scheduler = Scheduler(
        devices=1, lanes=pool.lanes, num_blocks=pool.num_blocks, block_size=pool.block_size,
        max_length=pool.max_length, prefill_budget=2048,
    )  # fmt: skip
    scheduler.check(3000, 4096)
    assert pool.lanes >= 4
    assert pool.tokens >= 1600 * pool.lanes
    with raises(f"exceeds the {pool.max_length} tokens that fit"):
        scheduler.check(pool.max_length, 1)


def test_lanes_and_pool_follow_from_memory():
    def chosen(gigabytes, devices=1, **options):
        free = int(gigabytes * 1e9)
        mesh = accelerator(devices)
        return choose_pool(NEO_OV_2B, {}, mesh, "bfloat16", free_bytes=free, **options)

    small, large, huge = chosen(2), chosen(8), chosen(200)
    assert small.lanes < large.lanes < huge.lanes == 64
    assert small.tokens < large.tokens < huge.tokens <= 64 * 40960
    assert large.max_length == large.tokens < 40960 == huge.max_length
    assert chosen(8, devices=4).tokens > 3.9 * large.tokens  # the heads are split
    assert chosen(8, slots=3).lanes == 3
    assert chosen(8, pool_tokens=5000).tokens == 5120 - 128
    given_length = chosen(8, max_length=1000, slots=4)
    assert given_length.max_length == 1000
    assert given_length.tokens == 4 * 1024


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_planned_shapes_cover_every_step_of_the_scheduler(data):
    """Whatever prompts come, with images up to the largest planned one."""
    draw, largest = data.draw, data.draw(st.sampled_from([0, 6, 30]))
    model = new_model(
        devices=draw(st.integers(1, 2)), num_blocks=draw(st.sampled_from([40, 60, 100])),
        max_length=draw(st.sampled_from([90, 150])),
        prefill_budget=draw(st.sampled_from([4, 16, 40])),
    )  # fmt: skip
    scheduler, size = model.scheduler, model.scheduler.block_size
    shapes = Shapes.of(scheduler.limits, -(-scheduler.max_length // size), largest)
    for number in range(draw(st.integers(1, 8))):
        length, place, images = draw(st.integers(1, 80)), 0, []
        while largest and place < length - 2 and draw(st.booleans()):
            start = draw(st.integers(place, length - 2))
            images.append((start, min(length - 1, start + draw(st.integers(1, largest)))))
            place = images[-1][1] + 1
        shared = draw(st.sampled_from([0, 10, 33]))
        ids = [
            *range(min(shared, length)),
            *range(1000 * (number + 1), 1000 * (number + 1) + length),
        ]
        model.add(make_sequence(number, ids[:length], draw(st.integers(1, 10)), images))
    for _ in range(10_000):
        if model.is_done:
            break
        step = model.step()
        if step and step.prefills:
            assert shapes.bucket_for(step.prefills, size) in shapes.all()
    assert model.is_done


def test_shapes_are_few():
    scheduler = Scheduler(
        devices=1, lanes=16, num_blocks=320, block_size=128, max_length=40960, prefill_budget=2048
    )
    shapes = Shapes.of(scheduler.limits, 320, 16_777_216 // 1024)
    assert shapes.fresh[:8] == (1, 2, 3, 4, 6, 8, 12, 16)
    assert shapes.fresh[-1] == scheduler.limits.max_rows(16384) == 137
    assert len(shapes.all()) < 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_loader(tmp_path_factory.mktemp("model"))


@pytest.mark.slow
def test_after_warming_nothing_is_compiled(model):
    """By requests of all kinds, among them an image of the largest size."""
    neo, compiled = model(1, 1, 1), []
    engine = neo.engine(
        slots=3, max_length=512, block_size=64, prefill_budget=128, max_pixels=320 * 320
    )
    assert engine.warm() == len(engine.plan()) + 2  # decoding, and what a penalty needs
    jitted = (programs.prefill, programs.decode, programs.set_seen)
    before = [program._cache_size() for program in jitted]

    def count(name, seconds, **_):
        if name.endswith("backend_compile_duration"):
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        penal = Sampling(max_new_tokens=3, repetition_penalty=1.2, penalize_prompt=True)
        requests = [
            Request("<image>" * n + "?", [image(n, 320, 320)] * n, sampling=penal) for n in (1, 3)
        ]
        requests += [
            Request(r.prompt, r.images, max_pixels=256 * 256, min_pixels=1024,
                    sampling=Sampling(max_new_tokens=40, temperature=float(i % 2)))
            for i, r in enumerate(mixed_requests(24)) if not r.video
        ]  # fmt: skip
        handles = [engine.submit(request) for request in requests]
        results = [handle.result() for handle in handles]
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert sum(result.error is None for result in results) > 15
    assert max(result.usage["prompt_tokens"] for result in results) > 300
    assert [program._cache_size() for program in jitted] == before
    assert compiled == []
    assert engine.warm() == len(engine.plan()) + 2
    assert [program._cache_size() for program in jitted] == before


def test_golden_video_frames_give_the_official_prompt():
    """The frames as files, through the whole front: prompt, pixels and ids of the golden."""
    meta, inputs = read_json("video", "meta.json"), arrays("video", "inputs.npz")
    neo = load_case("video")
    frames = [GOLDEN / "video" / name for name in meta["images"]]
    request = Request(
        meta["question"], frames, system=meta["system_message"] or "",
        min_pixels=meta["image_min_pixels"], max_pixels=meta["image_max_pixels"],
    )  # fmt: skip
    prepared = neo._prepare(request)
    np.testing.assert_array_equal(prepared.example.tokens, inputs["input_ids"])
    np.testing.assert_array_equal(prepared.example.thw.T, inputs["indexes"])
