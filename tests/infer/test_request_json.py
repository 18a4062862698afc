"""A line of a batch to a Request: the fields that it may have, and what is wrong with it."""

import json

import pytest

from helpers.batch_runs import answer_text, answered, read_lines, serve, write_lines
from helpers.golden import raises
from neo_jax.infer.offline import Counts, run_batch
from neo_jax.infer.request import Request
from neo_jax.infer.sampling import Sampling


def request_of(record, folder, **options):
    """The Request that a record comes to, or its error."""
    seen = []

    def remember(requests):
        for number, request in enumerate(requests):
            seen.append(request)
            yield number, answered(request)

    source = write_lines(folder / "in.jsonl", record)
    (folder / "out.jsonl").unlink(missing_ok=True)
    run_batch(source, folder / "out.jsonl", remember, **options)
    (line,) = read_lines(folder / "out.jsonl").values()
    return seen[0] if seen else line["error"]


def test_a_record_comes_to_a_request(tmp_path):
    record = {
        "prompt": "<image><image>a",
        "images": ["x.png", "/tmp/y.png"],
        "history": [["q", "a"]],
        "system": "s",
        "temperature": 1,
        "stop": ["."],
        "stop_token_ids": [3],
        "stop_on_repetition": True,
        "max_pixels": 65536,
        "min_pixels": None,
    }
    assert request_of(record, tmp_path) == Request(
        "<image><image>a",
        (f"{tmp_path}/x.png", "/tmp/y.png"),
        history=(("q", "a"),),
        system="s",
        sampling=Sampling(temperature=1, stop=(".",), stop_token_ids=(3,), stop_on_repetition=True),
        max_pixels=65536,
    )
    assert request_of({"prompt": "a", "image": "x.png"}, tmp_path).images == (f"{tmp_path}/x.png",)
    record = {"prompt": "a", "video": "v.mp4", "video_options": {"fps": 2, "span": [1, 2.5]}}
    options = {"fps": 2, "span": [1, 2.5]}
    video = f"{tmp_path}/v.mp4"
    assert request_of(record, tmp_path) == Request("a", video=video, video_options=options)
    record = {"prompt": "a", "video": ["1.png", "2.png"]}
    assert request_of(record, tmp_path).video == [f"{tmp_path}/1.png", f"{tmp_path}/2.png"]


def test_messages_are_a_prompt_with_history(tmp_path):
    def request(*texts, **fields):
        roles = {"s": "system", "u": "user", "a": "assistant"}
        messages = [{"role": roles[text[0]], "content": text} for text in texts]
        return request_of({"messages": messages, **fields}, tmp_path)

    assert request("u") == Request("u")
    assert request("s", "u", image="x") == Request("u", (f"{tmp_path}/x",), system="s")
    turns = (("u1", "a1"), ("u2", "a2"))
    assert request("s", "u1", "a1", "u2", "a2", "u3") == Request("u3", history=turns, system="s")
    for wrong in ([], ["s"], ["a"], ["u", "a"], ["u", "u", "u"], ["u", "s", "u"]):
        assert "messages: system, if any, then user and assistant" in request(*wrong)
    assert "messages, or prompt, history and system, not both" in request("u", prompt="u")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ('{"prompt": "a"', "not JSON: Expecting ',' delimiter at column 15"),
        ("[1]", "not a JSON object"),
        ('"\udcff"', "'utf-8' codec can't decode byte 0xff"),
        ("[" * 100000, "recursion"),
        ({"id": 1.5, "prompt": "a"}, "id is 1.5: use a text or an integer"),
        ({}, "no prompt: give a prompt or messages"),
        ({"prompt": 5}, "prompt is 5: use str"),
        ({"prompt": "\ud800"}, "prompt is"),
        ({"prompt": "a", "tempreature": 1}, "'tempreature': did you mean 'temperature'?"),
        ({"prompt": "a", "metadata": 1}, "'metadata': did you mean 'meta'?"),
        ({"prompt": "a", "temperature": "hot"}, "temperature is 'hot': use float"),
        ({"prompt": "a", "temperature": -1}, "temperature is -1: use 0 or from 1e-6"),
        ({"prompt": "a", "top_p": float("nan")}, "top_p is nan"),
        ({"prompt": "a", "penalize_prompt": "false"}, "penalize_prompt is 'false': use bool"),
        ({"prompt": "a", "stop_token_ids": [[1], [2, 3]]}, "use list[int]"),
        ({"prompt": "a", "images": "x.png"}, "images is 'x.png': use list[str]"),
        ({"prompt": "a", "images": [], "image": "x"}, "give image or images, not both"),
        ({"prompt": "a", "history": [["q"]]}, "history is [['q']]: use list[tuple[str, str]]"),
        ({"prompt": "a", "max_pixels": 10**30}, "max_pixels is"),
        ({"prompt": "a", "video_options": {"fsp": 1}}, "'fsp': did you mean 'fps'?"),
        ({"prompt": "a", "video_options": {"fps": "1"}}, "fps is '1': use float | None"),
        ({"messages": [{"role": "user"}]}, "give each a role and a content"),
        ({"messages": [{"role": "user", "content": [1]}]}, "use list[dict[str, str]]"),
    ],
)
def test_a_bad_record_fails_and_the_rest_go_on(line, error, tmp_path):
    text = line if isinstance(line, str) else json.dumps(line)
    source = tmp_path / "in.jsonl"
    source.write_bytes(
        f'{{"prompt": "a"}}\n\n{text}\n{{"prompt": "b"}}'.encode(errors="surrogateescape")
    )
    counts = run_batch(source, tmp_path / "out.jsonl", serve)
    assert counts == Counts(total=3, kept=0, failed=1, written=3)
    failed, *others = sorted(read_lines(tmp_path / "out.jsonl").values(), key=lambda x: x["text"])
    assert [(line["id"], line["text"]) for line in others] == [
        ("1", answer_text(Request("a"))),
        ("4", answer_text(Request("b"))),
    ]
    assert failed["id"] in ("3", "line 3")
    assert failed["finish_reason"] == "error"
    assert failed["error"].startswith("in.jsonl:3: ")
    assert error in failed["error"]


def test_defaults_fill_in(tmp_path):
    defaults = {"max_new_tokens": 9, "system": "s", "top_k": None}
    request = request_of({"prompt": "a", "max_new_tokens": 5}, tmp_path, defaults=defaults)
    assert request == Request("a", system="s", sampling=Sampling(max_new_tokens=5))
    with raises("max_new_tokens is 0"):
        request_of({"prompt": "a"}, tmp_path, defaults={"max_new_tokens": 0})
    assert not (tmp_path / "out.jsonl").exists()
