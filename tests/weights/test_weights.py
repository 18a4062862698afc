"""Loading checkpoints: layouts, dtypes, meshes, and an error for everything wrong."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import neo_jax
from benchmarks.random_checkpoint import write_checkpoint
from helpers import reference
from helpers.golden import GOLDEN, load_case, raises
from helpers.tolerance import assert_close
from neo_jax.configs.models import NEO_OV_2B, NEO_OV_9B, TINY
from neo_jax.model.neo import abstract_params, count_params
from neo_jax.model_config import QK_LAYOUTS
from neo_jax.weights.tensor_files import INDEX


@pytest.fixture
def broken(tmp_path):
    """A copy of a checkpoint of one file, for a test to damage."""
    return shutil.copytree(GOLDEN / "single_image/hf", tmp_path / "model")


@pytest.fixture
def broken_shards(tmp_path):
    """The same of a checkpoint of several files."""
    return shutil.copytree(GOLDEN / "multi_image/hf", tmp_path / "model")


def change_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("c", "layout", "tied", "count"),
    [
        (NEO_OV_2B, "expanded", False, 2_896_618_496),
        (NEO_OV_2B, "expanded", True, 2_585_453_568),
        (NEO_OV_9B, "expanded", False, 10_246_797_312),
        (NEO_OV_9B, "expanded", True, 9_624_467_456),
        (NEO_OV_9B, "fused", False, 9_365_982_720),
    ],
)
def test_parameter_counts(c, layout, tied, count):
    c = dataclasses.replace(c, qk_layout=layout, tie_word_embeddings=tied)
    assert count_params(c) == count


@pytest.mark.slow
@pytest.mark.parametrize("layout", QK_LAYOUTS)
def test_every_layout_agrees_with_the_numpy_reference(layout, tmp_path):
    c = dataclasses.replace(TINY, qk_layout=layout, rope_theta=1e3, rope_theta_hw=50.0)
    write_checkpoint(tmp_path / "model", c, dtype="F32")
    path = tmp_path / "model/model.safetensors"
    tensors = {
        key: array * 8 for key, array in load_file(path).items()
    }  # larger weights, so that every head matters
    save_file(tensors, path)
    neo = neo_jax.load(tmp_path / "model", dtype="float32", mesh=(1, 1, 1))
    assert neo.config.qk_layout == layout
    t, rng = neo.tokenizer, np.random.default_rng(1)
    ids = np.array(
        [7, t.image_start_id, *[t.image_context_id] * 6, t.image_end_id, 9]
        + [t.image_start_id, *[t.image_context_id] * 4, t.image_end_id, 11, 12]
    )
    pixels, grids = rng.normal(size=(40, 768)).astype(np.float32), np.array([[4, 6], [8, 2]])
    wanted = reference.logits(
        tensors, c.to_hf(), layout, ids, pixels, grids, t.image_context_id, t.image_start_id
    )
    logits = neo.logits(ids, pixels, grids)
    assert_close(logits, wanted, 2e-4)
    other = neo_jax.load(tmp_path / "model", dtype="float32", mesh=(2, 2, 2))
    assert_close(other.logits(ids, pixels, grids), logits, 1e-4)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_same_arrays_on_every_mesh(mesh):
    one, many = load_case("multi_image"), load_case("multi_image", mesh)
    jax.tree.map(np.testing.assert_array_equal, one.params, many.params)
    wanted = abstract_params(many.config, many.mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding.spec, many.params) == jax.tree.map(
        lambda leaf: leaf.sharding.spec, wanted
    )


def test_bfloat16_is_read_as_stored():
    stored = load_case("multi_image", dtype="bfloat16").params
    cast_up = load_case("multi_image", dtype="float32").params
    assert stored["embed"].dtype == jax.numpy.bfloat16
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), b), stored, cast_up
    )


def test_missing_directory_and_config(tmp_path):
    with raises("absent", "no such directory"):
        neo_jax.load(tmp_path / "absent")
    with raises("neither a config.json nor params there"):
        neo_jax.load(tmp_path)


def test_no_weights(broken):
    (broken / "model.safetensors").unlink()
    with raises("no model.*safetensors there"):
        neo_jax.load(broken)


@pytest.mark.parametrize("size", [4, 100, 500_000])
def test_truncated_file_is_named(broken, size):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with raises("model.safetensors", "truncated or not safetensors"):
        neo_jax.load(broken)


def test_all_key_problems_come_together(broken):
    def change(tensors):
        del tensors["language_model.model.norm.weight"]
        tensors["language_model.model.extra"] = np.zeros(3, np.float32)
        key = "language_model.model.layers.1.mlp.up_proj.weight"
        tensors[key] = tensors[key].T.copy()

    change_tensors(broken, change)
    with raises(
        "3 tensors do not fit",
        "missing: language_model.model.norm.weight",
        "unknown: language_model.model.extra",
        r"wrong shape: .*layers.1.mlp.up_proj.weight is \(64, 128\).* asks for \(128, 64\)",
    ):
        neo_jax.load(broken)


def test_wrong_type(broken):
    def change(tensors):
        key = "language_model.model.norm.weight"
        tensors[key] = tensors[key].astype(np.int32)

    change_tensors(broken, change)
    with raises("model.norm.weight is I32"):
        neo_jax.load(broken)


def test_missing_head_of_an_untied_model(broken):
    change_tensors(broken, lambda tensors: tensors.pop("language_model.lm_head.weight"))
    with raises("missing: language_model.lm_head.weight"):
        neo_jax.load(broken)
    change_json(broken / "config.json", lambda c: c["llm_config"].pop("tie_word_embeddings"))
    assert neo_jax.load(broken).config.tie_word_embeddings


def test_shard_problems(broken_shards):
    first, second = sorted(broken_shards.glob("model-*.safetensors"))[:2]
    kept = load_file(second)
    key, value = next(iter(load_file(first).items()))
    save_file({**kept, key: value}, second)
    with raises(f"{key} is in 2 files: {first.name}, {second.name}"):
        neo_jax.load(broken_shards)
    gone = next(iter(kept))
    save_file({k: v for k, v in kept.items() if k != gone}, second)
    with raises(f"says that {gone} is in {second.name}; it is not"):
        neo_jax.load(broken_shards)
    second.unlink()
    with raises(f"{second.name}: no such file"):
        neo_jax.load(broken_shards)
    (broken_shards / INDEX).unlink()
    with raises(f"2 shards but no {INDEX}"):
        neo_jax.load(broken_shards)


def test_generation_tensors_are_named_and_left_out(broken, caplog):
    key = "language_model.model.layers.0.self_attn.q_proj_mot_gen.weight"
    change_tensors(broken, lambda tensors: tensors.update({key: np.zeros(3, np.float32)}))
    neo_jax.load(broken)
    assert key in caplog.text


def test_config_variants():
    hf = json.loads((GOLDEN / "single_image/hf/config.json").read_text())
    wanted = neo_jax.load(GOLDEN / "single_image/hf").config
    hf["vision_config"] |= {"llm_hidden_size": [64], "downsample_ratio": [0.5]}
    assert type(wanted).from_hf(hf) == wanted
    llm = hf["llm_config"]
    llm["rope_parameters"] = {"rope_theta": llm.pop("rope_theta")}
    llm["rope_scaling"] = {"rope_type": "default"}
    assert type(wanted).from_hf(hf) == wanted
    published = NEO_OV_9B.to_hf()
    del published["llm_config"]["extra_num_layers"]
    assert type(wanted).from_hf(published) == NEO_OV_9B
    del llm["extra_num_layers"]
    with raises("extra_num_layers is missing", "add the Pre-Buffer's depth"):
        type(wanted).from_hf(hf)


def test_config_problems_come_together():
    hf = json.loads((GOLDEN / "single_image/hf/config.json").read_text())
    llm = hf["llm_config"]
    llm["hidden_sizes"] = llm.pop("hidden_size")
    llm["rope_scaling"] = {"rope_type": "yarn", "factor": 4}
    with raises("hidden_size is missing, did you mean 'hidden_sizes'", "rope_scaling is .*yarn"):
        type(TINY).from_hf(hf)
    with raises("no section 'vision_config'"):
        type(TINY).from_hf({"llm_config": llm})
    for section in ("a text", ["a list"]):
        with raises("no section 'llm_config'"):
            type(TINY).from_hf({**hf, "llm_config": section})


def test_broken_config_json_is_named(broken):
    (broken / "config.json").write_text("{")
    with raises("config.json"):
        neo_jax.load(broken)


def test_plain_qwen3_is_recognised(broken):
    save_file({"model.embed_tokens.weight": np.zeros((2, 2), np.float32)},
              broken / "model.safetensors")  # fmt: skip
    with raises("plain Qwen3"):
        neo_jax.load(broken)


def test_mesh_that_does_not_fit():
    with raises("needs 16 devices, 8 are here"):
        neo_jax.load(GOLDEN / "single_image/hf", mesh=(2, 4, 2))
    for mesh in ((1, 3, 1), (1, 1, 4)):
        with raises("does not divide", "2 key-value heads", "hidden size of 64"):
            neo_jax.load(GOLDEN / "single_image/hf", mesh=mesh)
    for mesh in ((0, 1, 1), (1, 1), "abc"):
        with raises("give the sizes of"):
            neo_jax.load(GOLDEN / "single_image/hf", mesh=mesh)
    with raises("dtype 'float64'"):
        neo_jax.load(GOLDEN / "single_image/hf", dtype="float64")


def test_arguments_of_logits_are_checked():
    neo = load_case("single_image")
    with raises("both, or neither"):
        neo.logits([1, 2], pixel_values=np.zeros((4, 768), np.float32))
    with raises(r"pixel_values is \(4, 768\), grid_hw asks for \(16, 768\)"):
        neo.logits([1, 2], np.zeros((4, 768), np.float32), np.array([[4, 4]]))
    with raises("token ids must lie in 0..599"):
        neo.logits([1, 600])
    for odd in ([], [[1, 2]], [1.5]):
        with raises("give .L. integers"):
            neo.logits(odd)
