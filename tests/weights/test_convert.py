"""Conversions in both directions: bits, layouts, meshes, and what the official code loads."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import neo_jax
from benchmarks.random_checkpoint import write_checkpoint
from helpers import commands
from helpers.conversions import all_tensors, assert_same_tensors, run
from helpers.golden import GOLDEN, arrays, load_case, raises
from helpers.tolerance import assert_close
from neo_jax.configs.models import TINY
from neo_jax.model.neo import init_params
from neo_jax.model_config import QK_LAYOUTS
from neo_jax.weights import orbax_files
from neo_jax.weights.tensor_files import INDEX, Tensor, open_tensors


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("converted") / "multi_image"
    run(commands.from_hf, GOLDEN / "multi_image/hf", directory, "--mesh", "1x2x2")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("layout", QK_LAYOUTS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("dtype", "shard_size"), [("BF16", "5GB"), ("F32", "400KB")])
def test_there_and_back_is_bit_equal(layout, tied, dtype, shard_size, tmp_path):
    c = dataclasses.replace(TINY, qk_layout=layout, tie_word_embeddings=tied)
    shard_bytes = 300_000 if dtype == "BF16" else 10**9
    write_checkpoint(tmp_path / "hf", c, dtype=dtype, shard_size=shard_bytes)
    assert (tmp_path / "hf" / INDEX).exists() == (dtype == "BF16")
    run(commands.from_hf, tmp_path / "hf", tmp_path / "ours")
    run(commands.to_hf, tmp_path / "ours", tmp_path / "back", "--shard-size", shard_size)
    assert (tmp_path / "back" / INDEX).exists() == (dtype == "F32")
    assert_same_tensors(tmp_path / "hf", tmp_path / "back")
    loaded = [neo_jax.load(tmp_path / name, mesh=(1, 1, 1)) for name in ("hf", "ours", "back")]
    assert loaded[0].config == loaded[1].config == loaded[2].config


@pytest.mark.parametrize("mesh", [(1, 1, 1), (8, 1, 1), (2, 2, 2)])
def test_restores_equal_arrays_on_every_mesh(converted, mesh):
    wanted = load_case("multi_image").params
    restored = neo_jax.load(converted, dtype="float32", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, restored.params, wanted)
    specs = [
        jax.tree.map(lambda leaf: leaf.sharding.spec, neo.params)
        for neo in (restored, load_case("multi_image", mesh))
    ]
    assert specs[0] == specs[1]


def test_logits_are_the_same_after_the_round_trip(converted, tmp_path):
    inputs, outputs = arrays("multi_image", "inputs.npz"), arrays("multi_image", "outputs.npz")
    run(commands.to_hf, converted, tmp_path / "back")
    batch = (inputs["input_ids"], inputs["pixel_values"], inputs["grid_hw"])
    for directory in (converted, tmp_path / "back"):
        logits = neo_jax.load(directory, dtype="float32", mesh=(1, 1, 1)).logits(*batch)
        np.testing.assert_array_equal(logits, load_case("multi_image").logits(*batch))
        assert_close(logits, outputs["logits"], 1e-5)


def test_side_files_come_along(converted, tmp_path):
    run(commands.to_hf, converted, tmp_path / "back")
    source = GOLDEN / "multi_image/hf"
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "back/neo_jax.json").exists()
    stored, written = (
        json.loads((directory / "config.json").read_text())
        for directory in (source, tmp_path / "back")
    )
    assert written == stored


def test_one_element_lists_of_a_config_become_numbers(tmp_path):
    hf = shutil.copytree(GOLDEN / "single_image/hf", tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    lists = {"llm_hidden_size": [64], "downsample_ratio": [0.5]}
    (hf / "config.json").write_text(
        json.dumps(config | {"vision_config": config["vision_config"] | lists})
    )
    run(commands.from_hf, hf, tmp_path / "ours")
    run(commands.to_hf, tmp_path / "ours", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text()) == config


def test_an_exported_config_is_of_the_model_whatever_lies_beside_it(converted, tmp_path):
    """A tokenizer's directory may have the config.json of a Qwen3, or of another NEO."""
    ours = shutil.copytree(converted, tmp_path / "ours")
    published = json.loads((GOLDEN / "multi_image/hf/config.json").read_text())
    llm, vision = published["llm_config"], published["vision_config"]
    wide = llm | {"hidden_size": 96, "vocab_size": 999, "layer_types": ["full_attention"] * 9}
    deep = llm | {"num_hidden_layers": 9, "extra_num_layers": 4}
    others = [
        json.loads((GOLDEN / "qwen3_init/untied/qwen3/config.json").read_text()),
        published | {"llm_config": wide, "vision_config": vision | {"llm_hidden_size": 96}},
        published | {"llm_config": deep},
    ]
    c, written = load_case("multi_image").config, tmp_path / "hf/config.json"
    for other in others:
        (ours / "config.json").write_text(json.dumps(other))
        run(commands.to_hf, ours, written.parent, "--overwrite")
        assert json.loads(written.read_text()) == c.to_hf("bfloat16")
    assert neo_jax.load(written.parent, dtype="float32", mesh=(1, 1, 1)).config == c
    kept = published | {"llm_config": llm | {"eos_token_id": 7}, "ours_does_not_know": 1}
    (ours / "config.json").write_text(json.dumps(kept))
    run(commands.to_hf, ours, written.parent, "--overwrite")
    assert json.loads(written.read_text()) == kept


def test_other_types(converted, tmp_path):
    run(commands.to_hf, converted, tmp_path / "f32", "--dtype", "f32")
    wide = all_tensors(tmp_path / "f32")
    for key, array in all_tensors(GOLDEN / "multi_image/hf").items():
        np.testing.assert_array_equal(wide[key], array.astype(np.float32))
    run(commands.from_hf, tmp_path / "f32", tmp_path / "narrow", "--dtype", "bfloat16")
    run(commands.to_hf, tmp_path / "narrow", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", GOLDEN / "multi_image/hf")


def test_save_hf_from_memory_on_a_mesh(tmp_path):
    for mesh in ((1, 1, 1), (2, 2, 2)):
        neo = load_case("single_image", mesh)
        neo_jax.save_hf(neo, neo.config, tmp_path / str(mesh))
        assert_same_tensors(tmp_path / str(mesh), GOLDEN / "single_image/hf")
    neo_jax.save_hf(neo.params, neo.config, tmp_path / "narrow", dtype="bfloat16")
    assert {tensor.dtype for tensor in open_tensors(tmp_path / "narrow").values()} == {"BF16"}
    with raises("exists: choose another place"):
        neo_jax.save_hf(neo, neo.config, tmp_path / "narrow")
    for change in ({"vocab_size": 512}, {"tie_word_embeddings": True}, {"num_post_llm_layers": 1}):
        with raises("not of this config's model"):
            neo_jax.save_hf(neo, dataclasses.replace(neo.config, **change), tmp_path / "other")


def test_a_step_of_a_training_run_is_exported(tmp_path):
    """Orbax's CheckpointManager writes the parameters, as in training."""
    import orbax.checkpoint as ocp

    neo = load_case("single_image")
    with ocp.CheckpointManager((tmp_path / "run/checkpoints").absolute()) as manager:
        for step, scale in ((3, 2.0), (12, 1.0)):
            params = jax.tree.map(lambda leaf, scale=scale: leaf * scale, neo.params)
            items = ocp.args.Composite(params=ocp.args.StandardSave(params))
            manager.save(step, args=items)
        manager.wait_until_finished()
    content = {"format": 1, "model": dataclasses.asdict(neo.config)}
    (tmp_path / "run/neo_jax.json").write_text(json.dumps(content))
    shutil.copy(GOLDEN / "single_image/hf/tokenizer.json", tmp_path / "run")
    run(commands.to_hf, tmp_path / "run", tmp_path / "hf")
    assert_same_tensors(tmp_path / "hf", GOLDEN / "single_image/hf")
    run(commands.to_hf, tmp_path / "run/checkpoints/3", tmp_path / "third")
    key = "language_model.model.norm.weight"
    np.testing.assert_array_equal(
        all_tensors(tmp_path / "third")[key], 2 * all_tensors(tmp_path / "hf")[key]
    )
    assert neo_jax.load(tmp_path / "run").config.num_layers == neo.config.num_layers


def test_each_device_reads_only_its_part(monkeypatch):
    """8 devices together read the bytes of the model, and those of unsplit tensors again."""
    read = []
    original = Tensor.__getitem__

    def counting(self, index):
        array = original(self, index)
        read.append(array.nbytes)
        return array

    monkeypatch.setattr(Tensor, "__getitem__", counting)
    directory = GOLDEN / "single_image/hf"
    total = sum(tensor.num_bytes for tensor in open_tensors(directory).values())
    neo_jax.load(directory, dtype="float32", mesh=(1, 1, 1))
    assert sum(read) == total
    read.clear()
    neo_jax.load(directory, dtype="float32", mesh=(1, 4, 2))
    assert total <= sum(read) < 1.6 * total  # unsplit tensors are read more than once


def test_generation_branch_of_a_u1_checkpoint_is_left_out(tmp_path, caplog):
    c = dataclasses.replace(TINY, qk_layout="fused")
    write_checkpoint(tmp_path / "u1", c, dtype="F32")
    path = tmp_path / "u1/model.safetensors"
    skipped = [
        "fm_modules.vision_model_mot_gen.embeddings.patch_embedding.weight",
        "language_model.model.layers.0.self_attn.q_proj_mot_gen.weight",
        "language_model.model.norm_mot_gen.weight",
    ]
    extra = dict.fromkeys(skipped, np.zeros(3, np.float32)) | {skipped[0]: np.zeros(3, np.int64)}
    save_file(load_file(path) | extra, path)
    run(commands.from_hf, tmp_path / "u1", tmp_path / "ours")
    for key in skipped:
        assert key in caplog.text
    assert neo_jax.load(tmp_path / "ours", mesh=(1, 1, 1)).config.qk_layout == "fused"


def test_check_reports_and_writes_nothing(tmp_path, capsys):
    source = shutil.copytree(GOLDEN / "single_image/hf", tmp_path / "hf")
    run(commands.from_hf, source, "--check")
    out = capsys.readouterr().out
    assert "language_model.model.layers.*.mlp.up_proj.weight [128, 64]" in out
    total = sum(np.prod(t.shape, dtype=int) for t in open_tensors(source).values())
    assert f"{total:,}" in out
    assert list(tmp_path.iterdir()) == [source]
    tensors = load_file(source / "model.safetensors")
    tensors["language_model.model.norm.weight"][:2] = [np.nan, np.inf]
    save_file(tensors, source / "model.safetensors")
    assert commands.from_hf([source, "--check"]) == 2
    err = capsys.readouterr().err
    assert "language_model.model.norm.weight has 2 NaN or infinite values" in err


def test_official_model_loads_our_export(converted, tmp_path):
    """Needs torch, transformers and the official code: NEO_OFFICIAL=.../VLMEvalKit."""
    import os
    import subprocess
    import sys

    official = os.environ.get("NEO_OFFICIAL")
    if not official:
        pytest.skip("NEO_OFFICIAL does not point to the official VLMEvalKit")
    for name in ("single_image", "multi_image", "text_only"):
        run(commands.from_hf, GOLDEN / name / "hf", tmp_path / name)
        run(commands.to_hf, tmp_path / name, tmp_path / f"{name}-hf")
        script = Path(__file__).parents[1] / "helpers/official_logits.py"
        inputs, saved = GOLDEN / name / "inputs.npz", tmp_path / f"{name}.npy"
        command = [sys.executable, script, official, tmp_path / f"{name}-hf", inputs, saved]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        wanted = arrays(name, "outputs.npz")["logits"]
        assert_close(np.load(saved), wanted, 1e-5)


@pytest.mark.slow
def test_init_params_and_the_key_table_agree(tmp_path):
    """Random parameters survive export and loading, whatever the layout."""
    for layout in QK_LAYOUTS:
        c = dataclasses.replace(TINY, qk_layout=layout)
        with jax.set_mesh(load_case("single_image").mesh):
            params = jax.jit(init_params, static_argnums=0)(c, jax.random.key(0))
        neo_jax.save_hf(params, c, tmp_path / layout)
        tokenizer = GOLDEN / "single_image/hf/tokenizer.json"
        shutil.copy(tokenizer, tmp_path / layout)
        restored = neo_jax.load(tmp_path / layout, dtype="float32", mesh=(1, 1, 1))
        jax.tree.map(np.testing.assert_array_equal, restored.params, params)


def test_pieces_cover_an_array_once():
    chunk = orbax_files.choose_chunk((4, 8, 6), (4, 8, 3), 2, is_layered=True)
    assert chunk == (1, 8, 3)
    lazy = orbax_files.LazyArray((4, 8, 6), np.dtype("float32"), chunk, read=None)
    count = np.zeros((4, 8, 6), int)
    for index in lazy.pieces():
        count[index] += 1
    assert (count == 1).all()
    big = orbax_files.choose_chunk((151936, 4096), (151936, 4096), 2, is_layered=False)
    assert big[0] * big[1] * 2 <= orbax_files.PIECE_BYTES
