"""A malformed row does not end an evaluation: it is named, and all others are scored."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from helpers import made_benchmarks as made
from neo_jax.eval import plots
from neo_jax.eval.benchmarks import BENCHMARKS
from neo_jax.eval.run import Plan, evaluate
from neo_jax.infer.request import Result

IMAGE = {"image": made.text64(4), "question": "Q"}
CHOICE = {**IMAGE, "A": "left", "B": "right", "answer": "A", "category": "c"}
WORDS = {**IMAGE, "answer": ["A", "A", "A", "A"]}
YES = {**IMAGE, "answer": "Yes", "category": "c"}
VIDEO = {"question": "Q", "video": "v", "candidates": ["left", "right"], "answer": "left"}
ANSWERS = {"pope": "yes", "mme": "yes"}  # to every question; "A" in all other benchmarks


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch):
    monkeypatch.setattr(plots, "draw", lambda parts, folder: [])  # for speed


def evaluated(name, folder):
    """The scored benchmark whose file is in a folder, and the problems by row."""

    def serve(requests):
        for number, _ in enumerate(requests):
            yield number, Result(ANSWERS.get(name, "A"), (), "stop", {})

    plan = Plan(name, folder, folder / "run")
    (scored,) = evaluate(plan, {}, serve)
    return scored, {problem["row"]: problem["problem"] for problem in scored.problems}


def of_rows(name, rows, folder):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{BENCHMARKS[name].files[0]}.jsonl").write_text(lines)
    return evaluated(name, folder)


@pytest.mark.parametrize(
    ("name", "row", "odd"),
    [
        ("pope", YES, {"answer": None}),
        ("docvqa", WORDS, {"answer": []}),
        ("textvqa", WORDS, {"answer": []}),
    ],
)
def test_a_row_without_a_right_answer_is_wrong_and_named(name, row, odd, tmp_path):
    scored, problems = of_rows(name, [row, row | odd, row], tmp_path)
    assert problems == {2: "no right answer in the file"}
    assert [one.verdict.score for one in scored.scored_rows] == [1, 0, 1]
    if name == "pope":  # the truth is not "Yes", so the answer is a false positive
        got = {metric.name: metric.value for metric in scored.metrics}
        assert (got["precision"], got["recall"]) == (pytest.approx(200 / 3), 100)


@pytest.mark.parametrize(
    ("name", "row", "odd", "message"),
    [
        ("3dsr", CHOICE | {"qid": "Q0000001"}, {"qid": None}, "no qid"),
        ("mme", YES | {"question_id": "1"}, {"category": None}, "no category"),
        ("mmbench", CHOICE | {"index": 3, "g_index": 3}, {"g_index": "x"}, "g_index 'x': not a"),
        ("longvideobench", VIDEO | {"correct_choice": 0}, {"correct_choice": "x"}, "choice 'x'"),
    ],
)
def test_a_row_that_no_summary_could_place_is_left_out_and_named(name, row, odd, message, tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v/0.png").write_bytes(made.encoded(4))
    scored, problems = of_rows(name, [row, row | odd], tmp_path)
    assert list(problems) == [2]
    assert problems[2].startswith("left out, cannot be scored: ") and message in problems[2]
    assert [one.verdict.score for one in scored.scored_rows] == [1]
    assert scored.metrics[0].value > 0


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"end": None}, "no end"),
        ({"start": "soon"}, "start 'soon': not a number of seconds"),
        ({"end": "inf"}, "end 'inf': not a number of seconds"),
        ({"video": "v" * 300}, "see --media"),
    ],
)
def test_a_row_that_cannot_be_asked_is_answered_with_nothing_and_named(odd, message, tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v/0.png").write_bytes(made.encoded(4))
    row = VIDEO | {"start": "0", "end": 1.5, "task_type": "t"}
    scored, problems = of_rows("mvbench", [row, row | odd], tmp_path)
    assert list(problems) == [2] and message in problems[2]
    assert [one.answer for one in scored.scored_rows] == ["A", "nan"]


def test_rows_of_a_damaged_parquet_file_are_left_out_and_named(tmp_path):
    path, rows = tmp_path / "AI2D_TEST.parquet", 6
    texts = pyarrow.array([b"Q"] * (rows - 1) + [b"\xff"]).view(pyarrow.string())
    cells = {name: [cell] * rows for name, cell in CHOICE.items()} | {"question": texts}
    pyarrow.parquet.write_table(pyarrow.table(cells), path, row_group_size=2)
    with pyarrow.parquet.ParquetFile(path) as file:
        offset = file.metadata.row_group(1).column(0).dictionary_page_offset
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 16)
    scored, problems = evaluated("ai2d", tmp_path)
    assert list(problems) == [3, 4, 6]
    places = {3: "row 0 of group 1", 4: "row 1 of group 1", 6: "row 1 of group 2"}
    for number, place in places.items():
        assert problems[number].startswith("left out: AI2D_TEST.parquet:")
        assert f"{path}: {place} cannot be read: " in problems[number]
    assert [one.verdict.score for one in scored.scored_rows] == [1, 1, 1]
