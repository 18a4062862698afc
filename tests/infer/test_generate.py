"""Generation against the official tokens, logits and texts; the cache against no cache."""

import functools

import jax
import numpy as np
import pytest

from helpers.golden import GOLDEN, arrays, load_case, raises, read_json
from neo_jax import Request, Sampling
from neo_jax.batch import to_device
from neo_jax.data.example import collate, make_example
from neo_jax.infer import programs
from neo_jax.model.neo import bind
from neo_jax.sharding import batch_rows, put

PROMPTS = ("single_image", "multi_image", "text_only")


@functools.partial(jax.jit, static_argnums=(0, 5))
def prefill(c, params, cache, batch, where, is_fresh):
    return bind(c, params).prefill(batch, cache, where, is_fresh)


@functools.partial(jax.jit, static_argnums=0)
def decode(c, params, cache, tokens_b, is_active_b):
    return bind(c, params).decode(tokens_b, cache, is_active_b)


def step_logits(neo, example, tokens, kv_dtype="float32", cut=None):
    """Logits from which each of `tokens` was chosen, fed one by one; the prompt in one or two."""
    c, rows = neo.config, batch_rows(neo.mesh)
    with jax.set_mesh(neo.mesh):
        cache = programs.new_state(c, neo.params, rows, 192, kv_dtype)
        stops = [cut, len(example.tokens)] if cut else [len(example.tokens)]
        start = 0
        for stop in stops:
            patches = 4 * int(example.is_image[:start].sum())
            part = type(example)(
                *(x[start:stop] for x in (example.tokens, example.thw, example.is_image)),
                example.patches[patches:],
                example.patch_hw[patches:],
            )
            batch = to_device(collate([part], 64, 256), neo.mesh)
            where = {"slot_r": np.zeros(rows, np.int32), "start_r": np.full(rows, start, np.int32)}
            where = {name: put(value, neo.mesh, "batch") for name, value in where.items()}
            t, end_rt = example.thw[:, 0], np.zeros((rows, 64), np.int32)
            end_rt[0, : stop - start] = np.searchsorted(t, t[start:stop], side="right")
            where["end_rt"] = put(end_rt, neo.mesh, "batch", None)
            logits, cache = prefill(c, neo.params, cache, batch, where, start == 0)
            start = stop
        result = [np.asarray(logits)[0]]
        for token in tokens[:-1]:
            tokens_b = put(np.full(rows, token, np.int32), neo.mesh, "batch")
            active = put(np.arange(rows) == 0, neo.mesh, "batch")
            logits, cache = decode(c, neo.params, cache, tokens_b, active)
            result.append(np.asarray(logits)[0])
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
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
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


@pytest.mark.parametrize("cut", [8, 30])
def test_a_prompt_in_two_chunks_gives_the_same_logits(cut):
    neo, (example, golden) = load_case("generate"), prompt_example("text_only")
    answer = golden["text_only_generated_ids"][:4]
    whole = step_logits(neo, example, answer)
    np.testing.assert_allclose(step_logits(neo, example, answer, cut=cut), whole, atol=1e-4, rtol=0)


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
    assert "max_new_tokens=512 that exceeds the context of 256" in result.error
