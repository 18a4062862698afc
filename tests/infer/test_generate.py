"""Generation against the official tokens, logits and texts; the cache against no cache."""

import functools

import jax
import numpy as np
import pytest

from helpers.chunks import PromptChunk, lay_out
from helpers.golden import GOLDEN, arrays, load_case, raises, read_json
from neo_jax import Request, Sampling
from neo_jax.data.example import make_example
from neo_jax.infer import programs
from neo_jax.model.neo import bind
from neo_jax.sharding import batch_rows, put

PROMPTS = ("single_image", "multi_image", "text_only")


@functools.partial(jax.jit, static_argnums=0)
def prefill(c, params, pool, batch, where):
    return bind(c, params).prefill(batch, pool, where)


@functools.partial(jax.jit, static_argnums=0)
def decode(c, params, pool, tokens_b, lanes):
    return bind(c, params).decode(tokens_b, pool, lanes)


def step_logits(neo, example, tokens, kv_dtype="float32", cuts=(), size=64):
    """Logits from which each of `tokens` was chosen, fed one by one; the prompt in chunks that end
    at `cuts` and at its end. On the last device of the batch axes, in blocks of `size`."""
    c, mesh = neo.config, neo.mesh
    devices = batch_rows(mesh)
    blocks = list(range(2, 2 + 192 // size))[::-1]
    with jax.set_mesh(mesh):
        state = programs.new_state(c, neo.params, 2, 2 + len(blocks), len(blocks), kv_dtype, size)
        pool, start = state["pool"], 0
        for stop in (*cuts, len(example.tokens)):
            chunk = PromptChunk(example, blocks, start, stop, devices - 1)
            rows = -(-stop // size) - start // size + 1
            context = len(blocks) + 1 if start else 0
            batch, where, (last,) = lay_out([chunk], rows, size, context, mesh)
            logits, pool = prefill(c, neo.params, pool, batch, where)
            start = stop
        result, lane = [np.asarray(logits)[last]], 2 * devices - 1
        t = int(example.thw[-1, 0])
        for number, token in enumerate(tokens[:-1]):
            lanes = {"length_b": len(example.tokens) + number, "t_b": t + 1 + number}
            lanes |= {"is_active_b": True, "block_table_bn": blocks}
            arrays = {name: np.array([value] * (lane + 1)) for name, value in lanes.items()}
            arrays["is_active_b"][:lane] = False
            arrays = {n: put(a, mesh, "batch", *[None] * (a.ndim - 1)) for n, a in arrays.items()}
            tokens_b = put(np.full(lane + 1, token, np.int32), mesh, "batch")
            logits, pool = decode(c, neo.params, pool, tokens_b, arrays)
            result.append(np.asarray(logits)[lane])
    return np.stack(result)


def prompt_example(name):
    golden, neo = arrays("generate", "generate.npz"), load_case("generate")
    patches = golden.get(f"{name}_pixel_values", np.zeros((0, 768), np.float32))
    grid_hw = golden[f"{name}_grid_hw"]
    return make_example(golden[f"{name}_prompt_ids"], patches, grid_hw, neo.tokenizer), golden


def official_request(name, **sampling):
    prompt = read_json("generate", "meta.json")["prompts"][name]
    return Request(
        prompt=prompt["question"],
        images=[GOLDEN / "generate" / image for image in prompt["images"]],
        system=prompt["system_message"] or "",
        min_pixels=4096,
        sampling=Sampling(**{"max_new_tokens": 48, **sampling}),
    )


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 2), (1, 2, 2)])
@pytest.mark.parametrize("name", PROMPTS)
def test_step_logits(name, mesh):
    example, golden = prompt_example(name)
    logits = step_logits(load_case("generate", mesh), example, golden[f"{name}_generated_ids"])
    np.testing.assert_allclose(logits, golden[f"{name}_step_logits"], atol=1e-3, rtol=0)


def test_decoding_equals_one_full_forward():
    neo, (example, golden) = load_case("generate"), prompt_example("multi_image")
    answer = golden["multi_image_generated_ids"][:12]
    ids = np.concatenate([example.tokens, answer])
    full = neo.logits(ids, golden["multi_image_pixel_values"], golden["multi_image_grid_hw"])
    cached = step_logits(neo, example, answer)
    np.testing.assert_allclose(cached, full[len(example.tokens) - 1 : -1], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [(8,), (16, 21, 30)], ids=str)
def test_a_prompt_in_chunks_gives_the_same_logits(cuts):
    neo, (example, golden) = load_case("generate"), prompt_example("text_only")
    answer = golden["text_only_generated_ids"][:4]
    whole = step_logits(neo, example, answer)
    chunked = step_logits(neo, example, answer, cuts=cuts, size=8)
    np.testing.assert_allclose(chunked, whole, atol=1e-4, rtol=0)


def test_int8_cache_stays_close():
    neo, (example, golden) = load_case("generate"), prompt_example("single_image")
    answer = golden["single_image_generated_ids"]
    exact = golden["single_image_step_logits"]
    logits = step_logits(neo, example, answer, kv_dtype="int8")
    assert np.abs(logits - exact).max() < 0.15 * exact.std()
    assert (logits.argmax(-1) == exact.argmax(-1)).mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_the_official_tokens(mesh):
    neo, golden = load_case("generate", mesh), arrays("generate", "generate.npz")
    plain = [official_request(name) for name in PROMPTS]
    penalised = [official_request(name, repetition_penalty=1.3) for name in PROMPTS]
    results = neo.generate([*plain, *penalised], slots=4, max_length=256)
    keys = [
        f"{name}_{kind}" for kind in ("generated_ids", "reppen_generated_ids") for name in PROMPTS
    ]
    for key, result in zip(keys, results, strict=True):
        assert list(result.token_ids) == golden[key].tolist(), key
        assert result.finish_reason == "length"


@pytest.mark.slow
def test_stops_at_the_stop_token_and_counts_it():
    golden, meta = arrays("generate", "generate.npz"), read_json("generate", "meta.json")["prompts"]
    stops = {name: meta[name]["eos_stop"] for name in PROMPTS}
    requests = [
        official_request(name, stop_token_ids=(stop["eos_token_id"],))
        for name, stop in stops.items()
    ]
    results = load_case("generate").generate(requests, slots=4, max_length=256)
    for (name, stop), result in zip(stops.items(), results, strict=True):
        wanted = golden[f"{name}_generated_ids"][: stop["generated_len"]]
        assert list(result.token_ids) == wanted.tolist()
        assert result.finish_reason == "stop"


@pytest.mark.parametrize("name", PROMPTS)
def test_chat_gives_the_official_text(name):
    prompt, request = read_json("generate", "meta.json")["prompts"][name], official_request(name)
    asked = {
        "question": request.prompt,
        "images": request.images,
        "system": request.system,
        "min_pixels": 4096,
        "max_new_tokens": 48,
    }
    neo = load_case("generate")
    assert neo.chat(**asked) == prompt["chat_response"]
    pieces = list(neo.chat(**asked, stream=True))
    assert len(pieces) > 5
    assert "".join(pieces) == prompt["chat_response"]


def test_context_overflow_names_the_numbers():
    neo = load_case("generate")
    with raises("max_new_tokens=40960", "context of 40960", "lower max_pixels"):
        neo.chat("Hello", max_new_tokens=40960)
    with raises("max_new_tokens is 0"):
        neo.chat("Hello", max_new_tokens=0)
    with raises("no setting 'temprature', did you mean 'temperature'"):
        neo.chat("Hello", temprature=1.0)
    (result,) = neo.generate([Request("Hello")], slots=1, max_length=256)
    assert result.finish_reason == "error"
    assert "max_new_tokens=512 that exceeds the 256 tokens that fit" in result.error
