"""A NEO grown from a plain Qwen3 has the official tensors, tokens and logits."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

import neo_jax
from benchmarks.random_checkpoint import write_checkpoint
from helpers import commands
from helpers.conversions import all_tensors, assert_same_tensors, run
from helpers.golden import GOLDEN, arrays
from helpers.tolerance import assert_close
from neo_jax.configs.models import TINY


def deterministic(name):
    return load_file(GOLDEN / "qwen3_init" / name / "neo_llm_deterministic.safetensors")


@pytest.mark.parametrize("name", ["untied", "tied_bf16_sharded", "untied_vocab_grown"])
def test_growth_from_qwen3_equals_the_official(name, tmp_path):
    golden = GOLDEN / "qwen3_init" / name
    config = json.loads((golden / "neo_llm_config.json").read_text())
    extra, rows = config["extra_num_layers"], config["vocab_size"]
    arguments = ("--pre-buffer", extra, "--vocab-size", rows, "--dtype", "float32", "--seed", 3)
    run(commands.from_qwen3, golden / "qwen3", tmp_path / "ours", *arguments)
    run(commands.to_hf, tmp_path / "ours", tmp_path / "hf")
    grown = all_tensors(tmp_path / "hf")
    for key, wanted in deterministic(name).items():
        np.testing.assert_array_equal(grown["language_model." + key], wanted.astype(np.float32))
    report = json.loads((GOLDEN / "qwen3_init/report.json").read_text())[name]
    for key, entry in report["random_tensors"].items():
        values = grown["language_model." + key]
        assert list(values.shape) == entry["shape"]
        assert values.std() == pytest.approx(0.02, rel=0.1)
    bias = grown["vision_model.embeddings.patch_embedding.bias"]
    assert 0.9 * 768**-0.5 < np.abs(bias).max() <= 768**-0.5
    run(commands.from_qwen3, golden / "qwen3", tmp_path / "again", *arguments)
    run(commands.to_hf, tmp_path / "again", tmp_path / "hf2")
    assert_same_tensors(tmp_path / "hf", tmp_path / "hf2")


@pytest.mark.parametrize("name", ["untied", "tied_bf16_sharded"])
def test_without_pre_buffer_it_is_still_that_qwen3(name, tmp_path):
    golden = GOLDEN / "qwen3_init" / name
    check = arrays("qwen3_init", name, "extra0_text_check.npz")
    shutil.copytree(golden / "qwen3", tmp_path / "qwen3")
    for path in (GOLDEN / "single_image/hf").glob("*token*"):
        shutil.copy(path, tmp_path / "qwen3")
    arguments = ("--pre-buffer", 0, "--vocab-size", 640)
    run(commands.from_qwen3, tmp_path / "qwen3", tmp_path / "ours", *arguments)
    neo = neo_jax.load(tmp_path / "ours", dtype="float32", mesh=(1, 1, 1))
    logits = neo.logits(check["input_ids"])[:, : check["qwen3_logits"].shape[1]]
    assert_close(logits, check["qwen3_logits"], 1e-5)


def test_pre_buffer_and_patch_embedding_from_a_neo(tmp_path):
    neo = dataclasses.replace(TINY, hidden_size=32, intermediate_size=48, num_pre_buffer_layers=2)
    write_checkpoint(tmp_path / "neo", dataclasses.replace(neo, head_dim=16), dtype="F32")
    source = GOLDEN / "qwen3_init/untied/qwen3"
    arguments = ("--pre-buffer", 2, "--pre-buffer-from", tmp_path / "neo")
    run(commands.from_qwen3, source, tmp_path / "ours", *arguments)
    run(commands.to_hf, tmp_path / "ours", tmp_path / "hf")
    grown, given = all_tensors(tmp_path / "hf"), all_tensors(tmp_path / "neo")
    for key in grown:
        if ".layers.0." in key or ".layers.1." in key or key.startswith("vision_model"):
            np.testing.assert_array_equal(grown[key], given[key])
    other_depth = ("--pre-buffer", 1, *arguments[2:])
    assert commands.from_qwen3([source, tmp_path / "x", *other_depth]) == 2


def test_grown_tokenizer_knows_neos_tokens(tmp_path):
    """Qwen3's tokenizer, slow or fast, gives the ids of the published tokenizer."""
    from neo_jax.data.tokenizer import NEO_TOKENS, NeoTokenizer, add_neo_tokens

    published = NeoTokenizer.from_directory(GOLDEN / "single_image/hf")
    for form in ("slow", "fast"):
        directory = tmp_path / form
        directory.mkdir()
        source = GOLDEN / "single_image/hf"
        config = json.loads((source / "tokenizer_config.json").read_text())
        added = json.loads((source / "added_tokens.json").read_text())
        for token in NEO_TOKENS:
            config["added_tokens_decoder"].pop(str(added.pop(token)))
        shutil.copy(source / "vocab.json", directory)
        shutil.copy(source / "merges.txt", directory)
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        (directory / "added_tokens.json").write_text(json.dumps(added))
        assert add_neo_tokens(directory) == published.vocab_size
        if form == "slow":
            (directory / "tokenizer.json").unlink()
        grown = NeoTokenizer.from_directory(directory)
        text = "<img><IMG_CONTEXT></img> Where is <ref>it</ref>?<|im_end|>"
        assert grown.encode(text) == published.encode(text)
        assert grown.decode(grown.encode(text)) == published.decode(published.encode(text))
