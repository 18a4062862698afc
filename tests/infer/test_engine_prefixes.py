"""What prompts have in common is computed once, and nothing else is shared."""

import dataclasses

import numpy as np
import pytest

from helpers.engine_requests import image, model_loader, tokens_of
from neo_jax import Request, Sampling
from neo_jax.infer import prepare

OPTIONS = {"slots": 4, "max_length": 512, "block_size": 32, "prefill_budget": 128}
SHORT = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_loader(tmp_path_factory.mktemp("model"))


def questions(count, seed=1):
    """About one image of 80 visual tokens, behind a common system prompt."""
    return [
        Request(
            f"<image>\nQuestion {i}?", [image(seed, 256, 320)], system="Be brief.", sampling=SHORT
        )
        for i in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 2)])
def test_a_common_prefix_is_computed_once(model, mesh):
    requests, neo = questions(10), model(*mesh)
    plain = neo.generate(requests, reuse_prefixes=False, **OPTIONS)
    engine = neo.engine(**OPTIONS)
    handles = [engine.submit(request) for request in requests]  # all are under way at once
    shared = [handle.result() for handle in handles]
    assert tokens_of(shared) == tokens_of(plain)
    assert {result.usage["cached_tokens"] for result in plain} == {0}
    cached = sorted(result.usage["cached_tokens"] for result in shared)
    # The whole blocks of what they have in common, by all but the first on each device.
    common = common_prefix(neo, requests) // 32 * 32
    assert common >= 96
    assert cached[0] == 0
    assert sum(count < common for count in cached) <= mesh[0]
    assert engine.stats()["prefix_hit_tokens"] == sum(cached)
    again = neo.generate(requests[:2], **OPTIONS)  # across calls
    assert all(result.usage["cached_tokens"] >= common for result in again)
    assert tokens_of(again) == tokens_of(plain[:2])


def common_prefix(neo, requests):
    ids = [neo._prepare(request).prefix_ids for request in requests]
    length = min(map(len, ids))
    return int(np.argmin([len({one[i] for one in ids}) == 1 for i in range(length)]))


@pytest.mark.slow
def test_a_hit_may_end_inside_an_image(model):
    """Only whole blocks are shared, so where an image ends in the middle of one, a part of it."""
    neo = model(1, 1, 1)
    first, second = questions(2)
    # The block with the image's last tokens has the question's first ones, which differ.
    second = dataclasses.replace(second, prompt="<image>Another question?")
    (plain,) = neo.generate([second], reuse_prefixes=False, **OPTIONS)
    _, shared = neo.generate([first], **OPTIONS), *neo.generate([second], **OPTIONS)
    is_image = neo._prepare(second).example.is_image
    cached = shared.usage["cached_tokens"]
    assert is_image[cached - 1] and is_image[cached]
    assert shared.token_ids == plain.token_ids


def test_another_image_of_the_same_size_shares_nothing_of_it(model):
    requests = [questions(1, seed)[0] for seed in range(50, 56)]
    neo = model(1, 1, 1)
    before = common_prefix(neo, requests)
    shared = neo.generate(requests, **OPTIONS)
    assert max(result.usage["cached_tokens"] for result in shared) <= before < 32
    assert tokens_of(shared) == tokens_of(neo.generate(requests, reuse_prefixes=False, **OPTIONS))


def test_an_image_that_differs_at_its_end_shares_nothing_of_its_beginning(model):
    """Its first tokens see the last ones, so their keys differ."""
    neo, (first,) = model(1, 1, 1), questions(1)
    pixels = np.asarray(first.images[0]).copy()
    pixels[-1, -1] ^= 255
    second = dataclasses.replace(first, images=[pixels])
    (plain,) = neo.generate([second], reuse_prefixes=False, **OPTIONS)
    neo.generate([first], **OPTIONS)
    (result,) = neo.generate([second], **OPTIONS)
    assert result.usage["cached_tokens"] < 32
    assert result.token_ids == plain.token_ids


def test_a_conversation_goes_on_from_its_cache(model):
    neo, photo = model(1, 1, 1), image(2, 256, 256)
    question = Request("<image>\nWhat?", [photo], sampling=Sampling(max_new_tokens=40))
    (first,) = neo.generate([question], **OPTIONS)
    follow = Request(
        "And now?", [photo], history=[(question.prompt, first.text)], sampling=SHORT
    )  # fmt: skip
    (second,) = neo.generate([follow], **OPTIONS)
    assert second.usage["cached_tokens"] >= (first.usage["prompt_tokens"] - 1) // 32 * 32 > 0
    (fresh,) = neo.generate([follow], reuse_prefixes=False, **OPTIONS)
    assert fresh.usage["cached_tokens"] == 0
    assert fresh.token_ids == second.token_ids


def test_equal_images_are_prepared_once(model, monkeypatch, tmp_path):
    path, calls = tmp_path / "image.png", []
    image(3).save(path)
    original = prepare.resized_pixels

    def counted(*given, **options):
        calls.append(given)
        return original(*given, **options)

    monkeypatch.setattr(prepare, "resized_pixels", counted)
    requests = [Request(f"Question {i}", [path], sampling=SHORT) for i in range(8)]
    model(1, 1, 1).generate(requests, **OPTIONS)
    assert len(calls) == 1
    image(4).save(path)  # another image under the same name
    model(1, 1, 1).generate(requests[:2], **OPTIONS)
    assert len(calls) == 2
