"""Continuous batching: the same answers whatever runs beside them, shared work done once."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from PIL import Image

import neo_jax
from benchmarks.random_checkpoint import write_checkpoint
from helpers.golden import load_case
from neo_jax import Request, Sampling
from neo_jax.configs.models import TINY
from neo_jax.infer import engine as engine_module
from neo_jax.infer import prepare, programs, sampling
from neo_jax.infer.slots import MIN_PREFIX

C = dataclasses.replace(
    TINY, num_post_llm_layers=1, num_attention_heads=8, num_key_value_heads=4, head_dim=16
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Loads one random model on any mesh; weights are large, so that answers are decided."""
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory / "hf", C, dtype="F32")

    @functools.cache
    def on(*mesh):
        neo = neo_jax.load(directory / "hf", dtype="float32", mesh=mesh)
        neo.params = jax.tree.map(lambda leaf: leaf * 4, neo.params)
        return neo

    return on


def picture(seed, height=64, width=96):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def mixed_requests(count):
    """Text of 10 to 2000 tokens, 1 to 5 pictures, and videos; different lengths of answer."""
    rng = np.random.default_rng(0)
    for i in range(count):
        text = "".join(map(chr, rng.integers(97, 122, rng.integers(3, 60))))
        options = {
            "sampling": Sampling(max_new_tokens=int(rng.integers(1, 14))),
            "min_pixels": 1024,
        }
        if i % 4 == 0:
            yield Request(text * int(rng.integers(1, 30)), **options)
        elif i % 4 == 3:
            frames = [picture(100 + i + k, 32, 64) for k in range(5)]
            yield Request(text, video=frames, video_options={"num_frames": 4}, **options)
        else:
            sizes = rng.integers(1, 9, (1 + i % 5, 2)) * 32
            images = [picture(i + k, *size) for k, size in enumerate(sizes)]
            yield Request("<image>" * len(images) + text, images, **options)


def tokens_of(results):
    assert [result.error for result in results] == [None] * len(results)
    return [result.token_ids for result in results]


@pytest.mark.slow
def test_64_mixed_requests_are_answered_alike_by_1_4_and_16_slots_and_on_a_mesh(model):
    requests = list(mixed_requests(64))
    lengths, answers = [], {}
    for mesh, slots in (((1, 1, 1), 1), ((1, 1, 1), 4), ((1, 1, 1), 16), ((2, 1, 4), 4)):
        results = model(*mesh).generate(requests, slots=slots, max_length=2048, prefill_budget=256)
        answers[mesh, slots] = tokens_of(results)
        lengths = [result.usage["prompt_tokens"] for result in results]
    assert min(lengths) < 50
    assert max(lengths) > 1000
    first = answers.pop(((1, 1, 1), 1))
    assert len({len(tokens) for tokens in first}) > 5
    for other in answers.values():
        assert other == first


@pytest.mark.slow
def test_results_do_not_depend_on_order_or_neighbours(model):
    requests = list(mixed_requests(12))
    options = {"slots": 4, "max_length": 2048, "prefill_budget": 512}
    sampled = [
        dataclasses.replace(
            request,
            sampling=Sampling(temperature=1.0, top_k=20, top_p=0.95, seed=i, max_new_tokens=8),
        )
        for i, request in enumerate(requests)
    ]
    neo = model(1, 1, 1)
    together = tokens_of(neo.generate(sampled, **options))
    assert tokens_of(neo.generate(sampled[::-1], **options)) == together[::-1]
    assert tokens_of(neo.generate(sampled[5:6], **options)) == together[5:6]
    other_seed = dataclasses.replace(sampled[5].sampling, seed=99)
    again = neo.generate([dataclasses.replace(sampled[5], sampling=other_seed)], **options)
    assert tokens_of(again) != together[5:6]


@pytest.mark.slow
def test_every_planned_program_is_compiled_once_and_no_other(model):
    neo = model(1, 1, 1)
    engine = neo.engine(slots=2, max_length=512, prefill_budget=256, kv_dtype="bfloat16")
    compiled = (programs.prefill, programs.decode, programs.copy_slot)
    before = sum(program._cache_size() for program in compiled)
    assert engine.warm() == sum(program._cache_size() for program in compiled) - before
    requests = [
        dataclasses.replace(request, sampling=Sampling(max_new_tokens=3))
        for request in mixed_requests(16)
        if len(request.prompt) < 300
    ]
    assert not any(result.error for _, result in engine.run(requests))
    assert engine.warm() == sum(program._cache_size() for program in compiled) - before


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 2)])
def test_a_common_prefix_is_computed_once(model, mesh):
    image = picture(1, 256, 320)
    requests = [
        Request(
            f"<image>\nQuestion {i}?",
            [image],
            system="Be brief.",
            sampling=Sampling(max_new_tokens=6),
        )
        for i in range(10)
    ]
    options = {"slots": 4, "max_length": 512}
    plain = model(*mesh).generate(requests, reuse_prefixes=False, **options)
    shared = model(*mesh).generate(requests, **options)
    assert tokens_of(shared) == tokens_of(plain)
    assert {result.usage["cached_tokens"] for result in plain} == {0}
    prefix = shared[0].usage["prompt_tokens"] - len("\nQuestion 0?<|im_end|>assistant ") - 12
    cached = [result.usage["cached_tokens"] for result in shared]
    devices = mesh[0]
    assert sum(count == 0 for count in cached) == devices
    assert all(count == 0 or count > prefix > MIN_PREFIX for count in cached)


@pytest.mark.slow
def test_a_conversation_goes_on_from_its_cache(model):
    neo, image = model(1, 1, 1), picture(2, 256, 256)
    engine = neo.engine(slots=2, max_length=512)
    question = Request("<image>\nWhat?", [image], sampling=Sampling(max_new_tokens=5))
    ((_, first),) = engine.run([question])
    follow = Request(
        "And now?", [image], history=[(question.prompt, first.text)],
        sampling=Sampling(max_new_tokens=5),
    )  # fmt: skip
    ((_, second),) = engine.run([follow])
    assert second.usage["cached_tokens"] >= first.usage["prompt_tokens"] - 1
    fresh = neo.generate([follow], slots=1, max_length=512)
    assert fresh[0].usage["cached_tokens"] == 0
    assert fresh[0].token_ids == second.token_ids


def test_another_picture_of_the_same_size_shares_nothing_of_it(model):
    requests = [
        Request("<image>\nWhat?", [picture(seed, 256, 256)], sampling=Sampling(max_new_tokens=6))
        for seed in range(6)
    ]
    options = {"slots": 2, "max_length": 512}
    shared = model(1, 1, 1).generate(requests, **options)
    assert {result.usage["cached_tokens"] for result in shared} == {0}
    assert tokens_of(shared) == tokens_of(
        model(1, 1, 1).generate(requests, reuse_prefixes=False, **options)
    )


@pytest.mark.slow
def test_equal_pictures_are_prepared_once(model, monkeypatch, tmp_path):
    path, calls = tmp_path / "picture.png", []
    picture(3).save(path)
    original = prepare.resized_pixels

    def counted(*given, **options):
        calls.append(given)
        return original(*given, **options)

    monkeypatch.setattr(prepare, "resized_pixels", counted)
    sampling = Sampling(max_new_tokens=1)
    requests = [Request(f"Question {i}", [path], sampling=sampling) for i in range(8)]
    model(1, 1, 1).generate(requests, slots=4, max_length=256)
    assert len(calls) == 1
    picture(4).save(path)  # another picture under the same name
    model(1, 1, 1).generate(requests[:2], slots=4, max_length=256)
    assert len(calls) == 2


def test_a_bad_request_gets_an_error_and_the_rest_go_on(model):
    good = Request("Hello", sampling=Sampling(max_new_tokens=4))
    bad = [
        Request("Hello", images=["/absent.png"]),
        Request("<image><image>", images=[picture(1)]),
        Request("x" * 3000),
        Request("Hello", images=[picture(1)], video=[picture(1)]),
        Request("Hello", video="/absent.mp4"),
        Request(None),
        Request("Hello", history=["no pair"]),
    ]
    said = [
        "no such file",
        "2 <image> marks",
        "exceeds",
        "not both",
        "absent.mp4",
        "not of None",
        "pairs",
    ]
    requests = [item for pair in zip(bad, [good] * len(bad), strict=True) for item in pair]
    results = model(1, 1, 1).generate(requests, slots=2, max_length=512)
    for text, failed, answered in zip(said, results[::2], results[1::2], strict=True):
        assert failed.finish_reason == "error"
        assert text in failed.error
        assert answered.error is None
        assert answered.token_ids == results[1].token_ids


@pytest.mark.slow
def test_requests_are_taken_as_they_are_needed(model):
    taken = []

    def endless():
        for number in range(10**9):
            taken.append(number)
            yield Request(f"Number {number}", sampling=Sampling(max_new_tokens=2))

    answers = model(1, 1, 1).serve(endless(), slots=2, max_length=256)
    assert len([next(answers) for _ in range(5)]) == 5
    answers.close()
    assert len(taken) < 20
    (result,) = model(1, 1, 1).generate([Request("Again", sampling=Sampling(max_new_tokens=2))],
                                        slots=2, max_length=256)  # fmt: skip
    assert result.error is None


def test_stop_texts_and_streaming(model):
    neo = model(1, 1, 1)
    whole = neo.chat("Tell me", max_new_tokens=30)
    stop = whole[8:11]
    cut = whole.index(stop)
    pieces = list(neo.chat("Tell me", max_new_tokens=30, stop=(stop,), stream=True))
    assert "".join(pieces) == whole[:cut].strip()
    (result,) = neo.generate([Request("Tell me", sampling=Sampling(max_new_tokens=30, stop=stop))],
                             slots=1, max_length=256)  # fmt: skip
    assert result.finish_reason == "stop"
    assert result.text == whole[:cut].strip()


def without_attention(neo):
    """A model whose next token depends on the last one alone: its greedy answers go in a loop."""
    stacks = {name: neo.params[name] for name in ("pre_buffer", "post_llm")}
    for name, stack in stacks.items():
        attention = {**stack["attention"], "o_nhd": 0 * stack["attention"]["o_nhd"]}
        stacks[name] = {**stack, "attention": attention}
    return dataclasses.replace(neo, params={**neo.params, **stacks}, _kept={}, _stream=None)


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
    requests = list(mixed_requests(12))
    options = {"slots": 4, "max_length": 2048, "prefill_budget": 512, "workers": 1}
    exact = tokens_of(model(1, 1, 1).generate(requests, **options))
    small = tokens_of(model(1, 1, 1).generate(requests, kv_dtype="int8", **options))
    equal = [a == b for ones, others in zip(exact, small, strict=True)
             for a, b in zip(ones, others, strict=False)]  # fmt: skip
    assert np.mean(equal) > 0.5


@pytest.mark.slow
def test_long_prompts_go_in_by_chunks_that_cut_no_picture(model, monkeypatch):
    """Seen from outside: every chunk that is ordered, and that the answer is the same."""
    chunks, original = [], engine_module.Engine._prefill

    def spy(self, chunk, parts):
        chunks.extend((running.next_chunk(self._budget), running) for running, _ in parts)
        return original(self, chunk, parts)

    monkeypatch.setattr(engine_module.Engine, "_prefill", spy)
    images = [picture(i, 256, 256) for i in range(4)]  # 64 visual tokens each
    request = Request("<image>x" * 4, images, sampling=Sampling(max_new_tokens=6))
    neo = model(1, 1, 1)
    (whole,) = neo.generate([request], slots=1, max_length=512)
    assert len(chunks) == 1
    chunks.clear()
    (cut,) = neo.generate([request], slots=1, max_length=512, prefill_budget=128)
    assert cut.token_ids == whole.token_ids
    assert len(chunks) > 2
    is_image = chunks[0][1].prepared.example.is_image
    for (start, stop), _ in chunks:
        assert stop - start <= 128
        assert stop == len(is_image) or not (is_image[stop] and is_image[stop - 1])
