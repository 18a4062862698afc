"""Greedy generation against the official 48 tokens and their logits; cache against no cache."""

import numpy as np
import pytest
from conftest import GOLDEN, arrays, load_case, raises, read_json

from neo_jax.data.example import make_example
from neo_jax.infer import generate
from neo_jax.infer.buckets import bucket, patch_bucket

PROMPTS = ("single_image", "multi_image", "text_only")


def prompt_example(name):
    golden, neo = arrays("generate", "generate.npz"), load_case("generate")
    ids = golden[f"{name}_prompt_ids"]
    patches = golden.get(f"{name}_pixel_values", np.zeros((0, 768), np.float32))
    grid_hw = golden[f"{name}_grid_hw"]
    return make_example(ids, patches, grid_hw, neo.tokenizer), golden


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("name", PROMPTS)
def test_tokens_and_step_logits(name, mesh):
    neo = load_case("generate", mesh)
    example, golden = prompt_example(name)
    steps = generate.greedy(neo.config, neo.params, neo.mesh, example, 48, stop_id=-1)
    tokens, logits = zip(*steps, strict=True)
    assert list(tokens) == golden[f"{name}_generated_ids"].tolist()
    np.testing.assert_allclose(np.stack(logits), golden[f"{name}_step_logits"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", PROMPTS)
def test_stops_at_the_stop_token_and_counts_it(name):
    neo, (example, golden) = load_case("generate"), prompt_example(name)
    stop = read_json("generate", "meta.json")["prompts"][name]["eos_stop"]
    steps = generate.greedy(
        neo.config, neo.params, neo.mesh, example, 48, stop_id=stop["eos_token_id"]
    )
    tokens = [token for token, _ in steps]
    assert tokens == golden[f"{name}_generated_ids"][: stop["generated_len"]].tolist()


@pytest.mark.parametrize("name", PROMPTS)
def test_chat_gives_the_official_text(name):
    prompt = read_json("generate", "meta.json")["prompts"][name]
    asked = {
        "question": prompt["question"],
        "images": [GOLDEN / "generate" / image for image in prompt["images"]],
        "system": prompt["system_message"] or "",
        "min_pixels": 4096,
        "max_new_tokens": 48,
    }
    neo = load_case("generate")
    assert neo.chat(**asked) == prompt["chat_response"]
    pieces = list(neo.chat(**asked, stream=True))
    assert len(pieces) > 5
    assert "".join(pieces) == prompt["chat_response"]


def test_decoding_equals_one_full_forward():
    neo, (example, golden) = load_case("generate"), prompt_example("multi_image")
    steps = list(generate.greedy(neo.config, neo.params, neo.mesh, example, 12, stop_id=-1))
    answer = [token for token, _ in steps]
    ids = np.concatenate([example.tokens, answer])
    full = neo.logits(ids, golden["multi_image_pixel_values"], golden["multi_image_grid_hw"])
    cached = np.stack([logits for _, logits in steps])
    np.testing.assert_allclose(cached, full[len(example.tokens) - 1 : -1], atol=1e-4, rtol=0)


def test_padding_to_another_bucket_changes_nothing(monkeypatch):
    neo, (example, _) = load_case("generate"), prompt_example("single_image")

    def logits():
        steps = generate.greedy(neo.config, neo.params, neo.mesh, example, 4, stop_id=-1)
        return np.stack([row for _, row in steps])

    first = logits()
    monkeypatch.setattr(generate, "bucket", lambda length: bucket(length) + 64)
    np.testing.assert_allclose(logits(), first, atol=1e-5, rtol=0)


def test_images_of_other_sizes_share_the_compiled_programs():
    neo = load_case("generate")
    image = GOLDEN / "generate/images/image_0.png"
    programs = (generate.prefill, generate.decode, generate.grow)

    def ask(pixels):
        neo.chat("What is this?", [image], min_pixels=pixels, max_pixels=pixels, max_new_tokens=3)
        return [program._cache_size() for program in programs]

    assert ask(24576) == ask(32768) == ask(49152)


def test_buckets_waste_at_most_a_third():
    for length in range(129, 5000):
        assert length <= bucket(length) < 1.5 * length
        assert bucket(bucket(length)) == bucket(length)
    assert len({bucket(length) for length in range(1, 40961)}) == 18
    assert patch_bucket(192, 4) >= 4 * 192
    assert patch_bucket(192, 0) == 0


def test_context_overflow_names_the_numbers():
    neo = load_case("generate")
    with raises("max_new_tokens=40960", "context of 40960", "lower max_pixels"):
        neo.chat("Hello", max_new_tokens=40960)
    with raises("ask for 1 or more"):
        neo.chat("Hello", max_new_tokens=0)
