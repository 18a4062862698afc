"""What an engine settles before it answers: memory, shapes, a request's tokens and pixels."""

import os

import jax
import numpy as np
import pytest

from helpers.golden import GOLDEN, arrays, load_case, raises, read_json
from neo_jax import Request
from neo_jax.infer import buckets, memory
from neo_jax.infer.memory import fitting_length


def test_memory_is_checked_before_anything_is_compiled():
    neo = load_case("generate")
    arguments = (neo.config, neo.params, neo.mesh, 16, "float32")
    with raises("16 slots of 4000 tokens need .* GB of cache", "lower slots or max_length", "int8"):
        fitting_length(*arguments, 4000, free_bytes=10**6)
    with raises("max_length 50000 exceeds the model's context of 40960"):
        fitting_length(*arguments, 50000)
    half = fitting_length(*arguments, 300, free_bytes=10**9)
    assert half == 300
    with raises("kv_dtype 'int4'"):
        neo.engine(kv_dtype="int4")
    with raises("slots, prefill_budget and workers"):
        neo.engine(slots=0)


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
    arguments = (neo.config, neo.params, neo.mesh, 4096, "float32", 40960)
    with raises(f"{free * 0.85 / 1e9:.2f} GB are free"):
        fitting_length(*arguments)


def test_planned_shapes_cover_what_can_be_asked():
    plan = buckets.plan(8192, 4096, budget=2048)
    assert len(plan) == len(set(plan))
    assert {chunk.rows for chunk in plan} == {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64}
    for rows in range(1, 65):
        for is_fresh in (True, False):
            chunk = buckets.bucket_for(rows, is_fresh)
            assert chunk in plan
            assert rows <= chunk.rows <= 1.5 * rows
    assert [buckets.rows_for(length) for length in (1, 64, 65, 1000)] == [1, 1, 2, 16]


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
