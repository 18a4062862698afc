"""Continuous batching: the same answers whatever runs beside them, and from however few blocks."""

import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import neo_jax
from helpers.engine_requests import image, mixed_requests, model_loader, tokens_of
from helpers.golden import load_case
from neo_jax import Request, Sampling
from neo_jax.infer import programs, sampling

# Few shapes, so that few programs are compiled.
OPTIONS = {"slots": 4, "max_length": 512, "block_size": 32, "prefill_budget": 128}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_loader(tmp_path_factory.mktemp("model"))


@pytest.mark.slow
def test_64_mixed_requests_are_answered_alike_by_1_4_and_16_lanes_and_on_a_mesh(model):
    """With a pool so small, and answers so long, that sequences are preempted; streamed."""
    neo = model(1, 1, 1)
    short = (r for r in mixed_requests(1000, new=130) if len(neo._prepare(r).prefix_ids) < 160)
    requests = list(itertools.islice(short, 64))
    options = {"max_length": 320, "pool_tokens": 320, "block_size": 16, "prefill_budget": 64}
    answers = {}
    for mesh, lanes in (((1, 1, 1), 1), ((1, 1, 1), 4), ((1, 1, 1), 16), ((2, 1, 4), 16)):
        engine = model(*mesh).engine(slots=lanes, **options)
        handles = [engine.submit(request) for request in requests]
        streamed = list(map("".join, in_threads(list, handles)))
        results = [handle.result() for handle in handles]
        assert streamed == [result.text for result in results]
        answers[mesh, lanes] = tokens_of(results)
        assert engine.stats()["blocks_used"] == 0
        assert lanes == 1 or engine.stats()["preemptions"] >= 20
    first = answers.pop(((1, 1, 1), 1))
    assert len({len(tokens) for tokens in first}) > 20
    for other in answers.values():
        assert other == first


def in_threads(function, arguments):
    with ThreadPoolExecutor(len(arguments)) as threads:
        return list(threads.map(function, arguments))


@pytest.mark.slow
def test_prompts_of_all_lengths_are_answered_alike(model):
    requests, neo = list(mixed_requests(32)), model(1, 1, 1)
    options = {"max_length": 2048, "block_size": 32, "prefill_budget": 256}
    results = neo.generate(requests, slots=4, **options)
    lengths = [result.usage["prompt_tokens"] for result in results]
    assert min(lengths) < 64
    assert max(lengths) > 1000
    other = neo.generate(requests, slots=16, **options | {"prefill_budget": 512})
    assert tokens_of(other) == tokens_of(results)


@pytest.mark.slow
def test_results_do_not_depend_on_order_or_neighbours(model):
    requests = [r for r in mixed_requests(16) if len(r.prompt) < 200]
    sampled = [
        dataclasses.replace(
            request,
            sampling=Sampling(temperature=1.0, top_k=20, top_p=0.95, seed=i, max_new_tokens=8),
        )
        for i, request in enumerate(requests)
    ]
    neo = model(1, 1, 1)
    together = tokens_of(neo.generate(sampled, **OPTIONS))
    assert tokens_of(neo.generate(sampled[::-1], **OPTIONS)) == together[::-1]
    assert tokens_of(neo.generate(sampled[5:6], **OPTIONS)) == together[5:6]
    other_seed = dataclasses.replace(sampled[5].sampling, seed=99)
    again = neo.generate([dataclasses.replace(sampled[5], sampling=other_seed)], **OPTIONS)
    assert tokens_of(again) != together[5:6]


@pytest.mark.slow
def test_a_penalty_outlives_a_preemption(model):
    """What a sequence may not repeat is known again when it is computed again."""
    penal = Sampling(max_new_tokens=150, repetition_penalty=1.3, penalize_prompt=True)
    requests = [Request(f"Question {i}", sampling=penal) for i in range(6)]
    neo = model(1, 1, 1)
    plain = tokens_of(neo.generate(requests, **OPTIONS))
    engine = neo.engine(**OPTIONS | {"max_length": 192}, pool_tokens=256)
    handles = [engine.submit(request) for request in requests]
    assert tokens_of([handle.result() for handle in handles]) == plain
    assert engine.stats()["preemptions"] > 0


@pytest.mark.slow
def test_a_bad_request_gets_an_error_and_the_rest_go_on(model):
    good = Request("Hello", sampling=Sampling(max_new_tokens=4))
    bad = {
        "no such file": Request("Hello", images=["/absent.png"]),
        "2 <image> marks": Request("<image><image>", images=[image(1)]),
        "exceeds": Request("x" * 3000),
        "not both": Request("Hello", images=[image(1)], video=[image(1)]),
        "absent.mp4": Request("Hello", video="/absent.mp4"),
        "not of None": Request(None),
        "pairs": Request("Hello", history=["no pair"]),
    }
    requests = [item for request in bad.values() for item in (request, good)]
    results = model(1, 1, 1).generate(requests, **OPTIONS)
    for expected, failed, answered in zip(bad, results[::2], results[1::2], strict=True):
        assert failed.finish_reason == "error"
        assert expected in failed.error
        assert answered.error is None
        assert answered.token_ids == results[1].token_ids


def test_stop_texts_and_streaming(model):
    neo = model(1, 1, 1)
    neo.engine(**OPTIONS)
    whole = neo.chat("Tell me", max_new_tokens=30)
    stop = whole[8:11]
    cut = whole.index(stop)
    pieces = list(neo.chat("Tell me", max_new_tokens=30, stop=(stop,), stream=True))
    assert "".join(pieces) == whole[:cut].strip()
    request = Request("Tell me", sampling=Sampling(max_new_tokens=30, stop=stop))
    (result,) = neo.generate([request], **OPTIONS)
    assert result.finish_reason == "stop"
    assert result.text == whole[:cut].strip()


def without_attention(neo):
    """A model whose next token depends on the last one alone: its greedy answers go in a loop."""
    stacks = {name: neo.params[name] for name in ("pre_buffer", "post_llm")}
    for name, stack in stacks.items():
        attention = {**stack["attention"], "o_nhd": 0 * stack["attention"]["o_nhd"]}
        stacks[name] = {**stack, "attention": attention}
    return neo_jax.Pipeline(neo.config, {**neo.params, **stacks}, neo.tokenizer, neo.mesh)


def test_a_loop_is_stopped_when_asked(monkeypatch):
    monkeypatch.setattr(sampling, "MIN_REPEATED_TOKENS", 64)
    neo = without_attention(load_case("generate"))
    looping = Sampling(max_new_tokens=400, stop_on_repetition=True)
    request = Request("How many boats are there?", sampling=looping)
    plain = dataclasses.replace(request, sampling=Sampling(max_new_tokens=400))
    stopped, free = neo.generate([request, plain], slots=2, max_length=512)
    assert free.finish_reason == "length"
    assert stopped.finish_reason == "repetition"
    assert sampling.is_repeating(stopped.token_ids)
    assert stopped.usage["completion_tokens"] == len(stopped.token_ids) < 400
    assert free.token_ids[: len(stopped.token_ids)] == stopped.token_ids


@pytest.mark.slow
def test_int8_cache_agrees_with_the_exact_one(model):
    requests = [r for r in mixed_requests(16) if len(r.prompt) < 200]
    exact = tokens_of(model(1, 1, 1).generate(requests, **OPTIONS))
    small = tokens_of(model(1, 1, 1).generate(requests, kv_dtype="int8", **OPTIONS))
    equal = [a == b for ones, others in zip(exact, small, strict=True)
             for a, b in zip(ones, others, strict=False)]  # fmt: skip
    assert np.mean(equal) > 0.5


@pytest.mark.slow
def test_long_prompts_go_in_by_chunks_that_cut_no_image(model, monkeypatch):
    """Seen from outside: every chunk that is dispatched, and that the answer is the same."""
    seen, original = [], programs.prefill

    def spy(config, params, state, rows):
        seen.append(np.asarray(rows["batch"]["segments"]).sum())
        return original(config, params, state, rows)

    monkeypatch.setattr(programs, "prefill", spy)
    images = [image(i, 256, 256) for i in range(4)]  # 64 visual tokens each
    request = Request("<image>x" * 4, images, sampling=Sampling(max_new_tokens=6))
    neo, options = model(1, 1, 1), {**OPTIONS, "reuse_prefixes": False}
    (whole,) = neo.generate([request], **{**options, "prefill_budget": 512})
    assert seen == [whole.usage["prompt_tokens"]]
    seen.clear()
    (cut,) = neo.generate([request], **options)
    assert cut.token_ids == whole.token_ids
    assert len(seen) > 2
    assert sum(seen) == whole.usage["prompt_tokens"]
