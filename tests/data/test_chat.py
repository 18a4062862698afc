"""Prompts, ids and positions against the official `chat`; the tokenizer in both its forms."""

import shutil

import numpy as np
import pytest

from helpers.golden import GOLDEN, load_case, raises, read_json
from neo_jax.data.chat import chat_prompt, expand_images
from neo_jax.data.positions import block_order, thw_positions
from neo_jax.data.tokenizer import NeoTokenizer

CASES = {case["name"]: case for case in read_json("chat", "inference_prompts.json")["cases"]}
# Where the official code goes on with marks or images left over, or fails later, we say so.
REFUSED = {
    "more_tags_than_images": "3 <image> marks, but 2 images",
    "more_images_than_tags": "1 <image> marks, but 2 images",
    "empty_list_history": "0 <image> marks, but 1 images",
}


@pytest.fixture(scope="module", params=["tokenizer.json", "slow files"])
def tokenizer(request, tmp_path_factory):
    source = GOLDEN / "single_image/hf"
    if request.param == "tokenizer.json":
        return NeoTokenizer.from_directory(source)
    directory = tmp_path_factory.mktemp("slow")
    slow = "vocab.json merges.txt added_tokens.json special_tokens_map.json tokenizer_config.json"
    for name in slow.split():
        shutil.copy(source / name, directory)
    return NeoTokenizer.from_directory(directory)


def prompt_of(case):
    return chat_prompt(
        case["question"],
        history=case["history"],
        system=case["system_message"] or "",
        num_images=len(case["grid_hw"]),
    )


@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED])
def test_prompt_ids_and_positions(name, tokenizer):
    case = CASES[name]
    prompt = expand_images(prompt_of(case), case["grid_hw"])
    assert prompt == case["prompt"]
    ids = tokenizer.encode(prompt)
    assert ids == case["input_ids"]
    arguments = (ids, case["grid_hw"], tokenizer.image_start_id, tokenizer.image_context_id)
    if "indexes_error" in case:
        with raises("grid_hw"):
            thw_positions(*arguments)
    else:
        assert thw_positions(*arguments).T.tolist() == case["indexes_thw"]


@pytest.mark.parametrize("name", REFUSED)
def test_marks_that_do_not_match_the_images(name):
    with raises(REFUSED[name], "put one mark where each image belongs"):
        prompt_of(CASES[name])


def test_strings_to_ids_and_back(tokenizer):
    golden = read_json("chat", "tokenizer_strings.json")
    for row in golden["encode"]:
        assert tokenizer.encode(row["text"]) == row["ids"], row["text"]
        assert tokenizer.decode(row["ids"], skip_special_tokens=False) == row["decode"]
        assert tokenizer.decode(row["ids"]) == row["decode_skip_special"]
    for row in golden["decode_random_ids"]:
        assert tokenizer.decode(row["ids"], skip_special_tokens=False) == row["decode"]
        assert tokenizer.decode(row["ids"]) == row["decode_skip_special"]
    assert tokenizer.vocab_size == golden["tokenizer_length"]


def test_context_token_without_image_start_is_refused():
    t = load_case("single_image").tokenizer
    ids = [5, *[t.image_context_id] * 4]
    with raises("token 1 is <IMG_CONTEXT> but no <img> is before it"):
        thw_positions(ids, [[4, 4]], t.image_start_id, t.image_context_id)
    ids = [t.image_start_id, *[t.image_context_id] * 4]
    with raises(r"images of \[4\] visual tokens, the images given have \[\]"):
        thw_positions(ids, [], t.image_start_id, t.image_context_id)


def test_block_order_makes_neighbours_of_the_patches_of_a_token():
    order, hw = block_order([[2, 4], [4, 2]])
    assert order[:8].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert order[8:].tolist() == [8, 9, 10, 11, 12, 13, 14, 15]
    assert hw[:4].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    np.testing.assert_array_equal(hw[-1], [3, 1])


def test_tokenizer_files_that_are_missing_or_broken(tmp_path):
    with raises("neither tokenizer.json nor vocab.json"):
        NeoTokenizer.from_directory(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    with raises("neither tokenizer.json nor merges.txt"):
        NeoTokenizer.from_directory(tmp_path)
    (tmp_path / "merges.txt").write_text("")
    with raises("lacks <IMG_CONTEXT>"):
        NeoTokenizer.from_directory(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<img>": 7}')
    with raises("<img> should have id 7, not 2"):
        NeoTokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with raises("tokenizer.json: not a tokenizer"):
        NeoTokenizer.from_directory(tmp_path)
