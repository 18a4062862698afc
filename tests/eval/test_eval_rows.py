"""Rows, images and videos of dataset tables, and the requests that are made of them."""

import numpy as np
import pytest

from helpers.golden import load_case, raises
from helpers.made_benchmarks import encoded, text64
from neo_jax.data.image import open_rgb, patchify, resized_pixels
from neo_jax.eval.messages import Frames
from neo_jax.eval.tables import hub, media
from neo_jax.eval.tables.benchmark_files import open_table
from neo_jax.eval.tables.rows import listed, make_row, options
from neo_jax.infer.prepare import Preparer
from neo_jax.infer.request import Request


def test_what_reads_as_empty_is_missing():
    row = make_row({"A": "None", "B": "no", "Question": "Q", "x": float("nan"), "y": None, "z": 0})
    assert row == {"B": "no", "question": "Q", "z": 0}


def test_options_are_read_however_they_are_given():
    wanted = {"A": "left", "B": "right"}
    for row in (
        wanted,
        {"options": ["left", "right"]},
        {"options": "['left', 'right']"},
        {"options": '["left", "right"]'},
        {"candidates": "['left', 'right']"},
        {"candidates": "A. left\nB. right\n"},
    ):
        assert options(row) == wanted
    assert options({}) == {}
    assert listed("[not a list]") == ["[not a list]"]
    assert listed("__import__('os').getcwd()") == ["__import__('os').getcwd()"]
    assert listed("[{[1]}]") == ["[{[1]}]"]


def test_lines_of_json_end_at_line_ends_only(tmp_path):
    path = tmp_path / "a.jsonl"
    text = "one\u2028two\u2029three\x85four"
    line = f'{{"question": "{text}"}}'
    path.write_bytes(f"\ufeff{line}\r\n\r\n{line}\n\n".encode())
    table = open_table(path)
    assert [table.row(number) for number in range(len(table))] == [{"question": text}] * 2


def test_a_bad_line_of_json_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "a\u2028b"}\n\n{"question": }\n')
    with raises("a.jsonl:3: not JSON: Expecting value at column 14"):
        open_table(path)
    path = tmp_path / "b.json"
    path.write_text('[\n{"question": "a"},\n{"question"}\n]')
    with raises("b.json:3: not JSON: Expecting ':' delimiter at column 12"):
        open_table(path)


@pytest.mark.parametrize(
    ("adapt", "row", "wanted"),
    [
        (hub.standard, {"choices": ["a", "b"], "answer": 1}, {"answer": "B"}),
        (hub.standard, {"options": ["a", "b"], "answer": "0"}, {"answer": "A"}),
        # A text, not a place.
        (hub.standard, {"options": ["1", "2"], "answer": "1"}, {"answer": "1"}),
        (hub.standard, {"choices": ["a", "b"], "answer": "(B)"}, {"answer": "B"}),
        (hub.standard, {"options": ["a", "b"], "answer": -1}, {"answer": -1}),  # a hidden answer
        (hub.standard, {"options": ["a", "b"], "answer": -99}, {"answer": -99}),
        (hub.standard, {"choice_a": "x", "choice_b": "y"}, {"A": "x", "B": "y"}),
        (hub.standard, {"answers": ["x", "y"]}, {"answer": ["x", "y"]}),
        (hub.standard, {"questionid": 7}, {"index": 7}),
        (hub.yes_no, {"answer": "no", "category": "popular"}, {"answer": "No"}),
        (
            hub.yes_no,
            {
                **{"category": "VD", "subcategory": "figure", "set_id": "3", "figure_id": "1"},
                **{"question_id": "0", "gt_answer": "1"},
            },
            {"index": "VD_figure_x_3_1_0", "answer": "Yes", "l2-category": "figure"},
        ),
        (hub.mmmu, {"id": "validation_Art_Theory_3"}, {"split": "validation"}),
        (hub.mmmu, {"id": "validation_Art_Theory_3"}, {"category": "Art Theory"}),
        (hub.mmmu, {"id": "3"}, {"id": "3"}),
        (hub.chartqa, {"type": "human_test"}, {"split": "test_human"}),
        (hub.ocrbench, {"question_type": "Doc-oriented VQA"}, {"category": "Doc-oriented VQA"}),
        (hub.video, {"option0": "a", "option1": "b"}, {"candidates": ["a", "b"]}),
        (hub.video, {"options": ["A. a"]}, {"candidates": ["A. a"]}),
    ],
)  # fmt: skip
def test_rows_of_the_hub_become_official_ones(adapt, row, wanted):
    adapted = adapt(row)
    assert {name: adapted[name] for name in wanted} == wanted
    assert adapt(adapted) == adapted


def red(image):
    return open_rgb(image).getpixel((0, 0))[0]


def test_pictures_are_found_in_every_kind_of_cell(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "Q"}\n')
    table = open_table(tmp_path / "a.jsonl")
    (tmp_path / "photos").mkdir()
    for number in (1, 2):
        (tmp_path / f"photos/{number}.png").write_bytes(encoded(number))
    for row, wanted in (
        ({"image": text64(1)}, [1]),
        ({"image": "data:image/png;base64," + text64(1)}, [1]),
        ({"image": str([text64(1), text64(2)])}, [1, 2]),
        ({"image": encoded(3)}, [3]),
        ({"image": {"bytes": encoded(3), "path": "x"}}, [3]),
        ({"images": [{"bytes": encoded(3)}, None, encoded(4)]}, [3, 4]),
        ({"image": {"bytes": None, "path": "photos/1.png"}}, [1]),
        ({"image_2": encoded(2), "image_10": encoded(10), "image_1": encoded(1)}, [1, 2, 10]),
        ({"image_path": "photos/2.png"}, [2]),
        ({"image_path": "['/photos/1.png', 'photos/2.png']"}, [1, 2]),
        ({}, []),
    ):
        assert [red(one) for one in media.images(row, table, [tmp_path])] == wanted
    for row, message in (
        ({"image": "17"}, "neither an image nor the index"),
        ({"image": "A" * 69}, "bad base64"),
        ({"image": 3.5}, "float is neither base64, bytes nor a path"),
        ({"image_path": "photos/3.png"}, "photos/3.png: not in"),
        ({"image_path": "p" * 300}, "ppp: not in"),  # no file system has such a name
    ):
        with raises(message):
            media.images(row, table, [tmp_path])


def test_videos_are_found_by_name_and_ending(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/a.mp4").write_bytes(b"")
    (tmp_path / "frames").mkdir()
    assert media.video(["none", "a"], [tmp_path]) == str(tmp_path / "videos/a.mp4")
    assert media.video(["frames"], [tmp_path]) == str(tmp_path / "frames")
    with raises("video b or c: not in"):
        media.video(["b", "c"], [tmp_path])


def test_a_request_may_have_its_own_layout_and_larger_pictures():
    neo = load_case("generate")
    prepare = Preparer(neo.config, neo.tokenizer)
    image = open_rgb(encoded(7))
    limits = {"min_pixels": 1024, "max_pixels": 9216}
    made = prepare(Request("<image><image>Q", [image, image], num_upscaled=1, **limits))
    large, _ = patchify(resized_pixels(image, 1024, 9216, upscale=True))
    small, _ = patchify(resized_pixels(image, 1024, 9216))
    assert len(large) > len(small)
    np.testing.assert_array_equal(
        np.sort(made.example.patches, axis=None), np.sort(np.concatenate([large, small]), axis=None)
    )
    video = Request(
        "Q<image>\nat the end",
        images=[image],
        video=[image, image],
        video_options={"min_pixels": 1024, "max_pixels": 1024},
        lay_out=Frames(header=False, labels="numbers"),
        **limits,
    )
    text = neo.tokenizer.decode(prepare(video).example.tokens)
    assert "Frame-1:" in text and "at the end" in text
    assert prepare(video).example.is_image.sum() == 2 + len(small) // 4
    with raises("give images or a video, not both"):
        prepare(Request("Q", [image], video=[image]))
