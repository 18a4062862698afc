"""Prompts are those of the official wrappers, character by character."""

import numpy as np
import pytest
from PIL import Image

from helpers.golden import raises, read_json
from neo_jax.data.video import Video
from neo_jax.eval import messages, prompts
from neo_jax.eval.benchmarks import BENCHMARKS, TABLE, choose
from neo_jax.eval.messages import Frames
from neo_jax.eval.settings import make_settings
from neo_jax.eval.tables.rows import make_row

CASES = read_json("chat", "evaluation_prompts.json")
NAMES = {benchmark.files[0]: benchmark for benchmark in TABLE}


def asked():
    """Cases of benchmarks whose wording is that of an official wrapper, with the wrapper's name."""
    for case in CASES["dataset_prompts"]:
        benchmark = NAMES.get(case["dataset"])
        wrapper = "neo_si" if benchmark and benchmark.group == "spatial" else "neo"
        if benchmark and case.get(f"{wrapper}_message") is not None:
            yield pytest.param(benchmark, case, wrapper, id=case["dataset"])


@pytest.mark.parametrize(("benchmark", "case", "wrapper"), list(asked()))
def test_questions_are_worded_as_officially(benchmark, case, wrapper):
    pixels = make_settings(benchmark.group, "official", benchmark.settings)
    assert [pixels.min_pixels, pixels.max_pixels] == case[f"{wrapper}_min_max_pixels"]
    message = case[f"{wrapper}_message"]
    parts = [part["value"] if part["type"] == "text" else None for part in message]
    assert benchmark.ask(make_row(case["line"]), parts.count(None)) == parts


def laid_out():
    """Cases of images; videos have a test below, BMMR is not in the table."""
    for case in CASES["reorganize_prompt"]:
        of_frames = any(p["type"] == "image" and "frame" in p["value"] for p in case["message"])
        is_known = not (case["dataset"] or "").startswith("BMMR")
        if is_known and not of_frames and not case["is_video_dataset"]:
            yield pytest.param(case, id=case["name"])


@pytest.mark.parametrize("case", list(laid_out()))
def test_pictures_are_laid_out_as_officially(case):
    parts = [part["value"] if part["type"] == "text" else None for part in case["message"]]
    if case["dataset"] == "MUIRBench_EASI":
        assert messages.named(parts) == case["neo_si"]
    else:
        assert messages.general(parts) == case["neo"]
        assert messages.spatial(parts) == case["neo_si"]


def test_settings_are_the_official_ones():
    sampled = CASES["generate_inner_settings"]["MMStar"]
    for name, benchmark in BENCHMARKS.items():
        settings = make_settings(benchmark.group, "official", benchmark.settings)
        if benchmark.group == "spatial":
            assert (settings.system, settings.temperature) == ("", 0), name
            assert settings.max_new_tokens == 4096
            continue
        assert settings.system == sampled["system_message"]
        for field, value in sampled["generation_config"].items():
            assert field == "do_sample" or getattr(settings, field) == value
        greedy = make_settings(benchmark.group, "greedy", benchmark.settings)
        assert greedy.sampling(3).temperature == 0


def video(*times):
    return Video((Image.new("RGB", (32, 32)),) * len(times), np.array(times), 0.5, 32.4)


def test_frames_are_laid_out_as_officially():
    found = {case["name"]: case for case in CASES["reorganize_prompt"]}
    three = video(1.0, 2.0, 3.0)
    header = "The time range of this video is [00:00-00:32], and the following is a series of 3 "
    header += "frames sampled at 0.5 FPS.\n"
    prompt = Frames()(three, "Q")
    assert prompt.startswith(header)
    wanted = found["video_ts"]["neo_after_build_video_prompt"].replace("range\n", header)
    assert prompt == wanted
    assert (
        Frames(before="SYS ", header=False, labels="none")(
            video(1.0, 2.0), "Question: x\nOptions:\n(A) a\n(B) b\nOnly give the best option."
        )
        == found["video_empty_ts"]["neo_after_build_video_prompt"]
    )
    assert (
        Frames(header=False, subtitles=((1.0, 1.4, "some line"),))(video(1.0, 2.0), "Q")
        == found["video_subtitles"]["neo_after_build_video_prompt"]
    )
    assert (
        Frames(header=False, labels="numbers")(video(1.0, 2.0), "These are frames of a video.\nQ")
        == found["images_only_vsi"]["neo_si_after_build_video_prompt"]
    )
    assert Frames(header=False, labels="none")(video(1.0), "See Image-2").endswith("See Frame-2")


def test_subtitles_stand_by_their_frames(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(
        '[{"timestamp": [10.0, 14.0], "text": "one"}, {"timestamp": [30.0, null], "text": "two"},'
        ' {"start": "00:00:40.0", "end": "00:00:40.2", "line": "gone"}]'
    )
    row = {"starting_timestamp_for_subtitles": 10.0, "duration": 45.0}
    lines = messages.read_subtitles(path, row)
    assert lines == ((0.0, 4.0, "one"), (20.0, 35.0, "two"), (30.0, pytest.approx(30.2), "gone"))
    prompt = Frames(header=False, subtitles=lines)(video(1.0, 3.0, 25.0, 40.0), "Q")
    assert prompt == (
        "[00:01.00]:<image>\none\n[00:03.00]:<image>\n[00:25.00]:<image>\ntwo\n[00:40.00]:<image>\nQ"
    )
    path.write_text("{")
    with raises("a.json: not subtitles"):
        messages.read_subtitles(path, row)


CHOICE = {"question": "Which?", "A": "left", "B": "right", "answer": "A"}


def test_prompts_that_only_the_benchmarks_have():
    listed = {"question": "Where?", "options": "['left', 'right']", "candidates": "A. l\nB. r"}
    assert prompts.view_spatial(listed, 2) == [
        *(None, None),
        "Question: Where?\nChoices: A. l\nB. r\nReply only to the corresponding option.\nAnswer:",
    ]
    assert prompts.mmsi({**CHOICE, "hint": "h"}, 1)[1] == (
        "Hint: h\nWhich?\nOptions: A: left, B: right, \nAnswer with the option's letter from the "
        "given choices directly. Enclose the option's letter within ``."
    )
    asked = "Options:\nA: left\nB: right\nGive me the answer letter directly. The best answer is:"
    assert prompts.site(listed, 1) == [None, f"Question: Where?\n{asked}"]
    marked = {**listed, "question": "Is <image> near <image>?"}
    assert prompts.site(marked, 3) == ["Question: Is", None, "near", None, f"?\n{asked}"]
    assert prompts.muirbench({**CHOICE, "question": "Is <image> so?"}, 2) == [
        *("Question: Is", None),
        "so?\nChoices: \n(A) left\n(B) right\n\nHint: Please provide the correct option letter, "
        "such as A, B, C, D, directly.\nAnswer:",
        None,
    ]
    assert prompts.vsi({"question": "How many?"}).endswith("directly in one float number.")
    assert prompts.vsi({"question": "Q", "candidates": "['A. 1', 'B. 2']"}).startswith(
        "These are frames of a video.\nQ\nA. 1\nB. 2\nAnswer with"
    )
    adapted = {"category": "Adaptation", "question": "See <image 1> now", "options": '["x", "y"]'}
    prompt = prompts.video_mmmu({**adapted, "question_type": "multiple-choice"})
    assert "See <image>\n now\nA. x\nB. y" in prompt
    assert prompts.video_mmmu({**adapted, "question": "Q"}).endswith("Q<image>\n")


def test_benchmarks_are_chosen_by_name_or_group():
    assert [one.name for one in choose("docvqa, mmstar,docvqa")] == ["docvqa", "mmstar"]
    assert {one.group for one in choose("video")} == {"video"}
    with raises("no benchmark 'mmstr': there are mmmu, mmbench"):
        choose("mmstr")
    with raises("name benchmarks"):
        choose(",")


def test_wrong_settings_are_named():
    for override, message in (
        ("max_new_token=3", "did you mean 'max_new_tokens'"),
        ("top_k=many", "top_k: 'many' is not int"),
        ("upscale=1", "upscale: '1' is not bool"),
        ("prefix=@nowhere.txt", "nowhere.txt: cannot read"),
        ("seed", "write name=value"),
    ):
        with raises(message):
            make_settings("image", "greedy", {}, [override])
    with raises("preset 'best': use one of greedy, official"):
        make_settings("image", "best", {})
    assert make_settings("video", "greedy", {"fps": 2.0}, ["fps=0.5", "upscale=true"]).fps == 0.5
