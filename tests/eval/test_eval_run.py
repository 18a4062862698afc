"""Runs of benchmarks: of every format, killed and resumed, malformed, shared by hosts."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import pytest

from helpers import made_benchmarks as made
from helpers.golden import ROOT, raises
from neo_jax.eval import benchmarks, prompts
from neo_jax.eval.run import Plan, evaluate, score_run

MODEL = {"directory": "made"}

# Evaluates, prints the count after each answer, and pauses after the last one wanted.
_SLOW = """
import sys, time
sys.path[:0] = ["tests", "."]
from helpers import made_benchmarks as made
from pathlib import Path
from neo_jax.eval.run import Plan, evaluate
name, data, out, last = sys.argv[1:]

def slow(requests):
    for number, result in enumerate(made.serve(requests)):
        yield result
        print(number + 1, flush=True)
        time.sleep(1000 if number + 1 == int(last) else 0)

evaluate(Plan(name, Path(data), Path(out)), {"directory": "made"}, slow)
"""


def report_of(out, name):
    parts = json.loads((out / "report.json").read_text())["benchmarks"]
    return next(part for part in parts if part["name"] == name)


def lines_of(out, name):
    path = out / name / "predictions.jsonl"
    found = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len({line["id"] for line in found}) == len(found)
    return found


def run_and_kill(name, data, out, wanted):
    arguments = [sys.executable, "-c", _SLOW, name, str(data), str(out), str(wanted)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=ROOT, env=environment)
    while int(process.stdout.readline()) < wanted:
        pass
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def right_share(lines, about):
    """The score, counted from the numbers of the rows without any scorer of the package."""
    right = []
    for line in lines:
        number, letter = about(line["meta"]), re.search("[ABCD]", line["text"] or "nan")
        right.append(letter is not None and letter[0] == made.right_letter(number))
    return 100 * sum(right) / len(right)


@pytest.mark.slow
@pytest.mark.parametrize("name", made.FORMATS)
def test_two_hundred_rows_survive_kills_and_are_counted_right(name, tmp_path):
    write, about = made.FORMATS[name]
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    write(data)
    before = b""
    for wanted in random.Random(name).sample(range(20, 90), 2):
        run_and_kill(name, data, out, wanted)
        after = (out / name / "predictions.jsonl").read_bytes()
        assert after.startswith(before)
        assert after.count(b"\n") >= before.count(b"\n") + wanted - 1
        before = after[: after.rfind(b"\n") + 1]
    asked = []

    def counted(requests):
        yield from made.serve(asked.append(1) or request for request in requests)

    evaluate(Plan(name, data, out), MODEL, counted)
    lines = lines_of(out, name)
    assert (out / name / "predictions.jsonl").read_bytes().startswith(before)
    assert len(lines) == made.ROWS
    assert 0 < len(asked) <= made.ROWS - before.count(b"\n")
    # Each row was asked about its own image.
    for line in lines:
        if "error" not in line:
            assert line["text"] == f"The answer is {made.seen_letter(about(line['meta']))}."
    part = report_of(out, name)
    if name == "mmbench":  # the rotated rows are right: a question scores as its first row
        firsts = [line for line in lines if int(line["meta"]["index"]) < 1_000_000]
        assert len(firsts) == part["metrics"][0]["count"] == 100
        assert part["metrics"][0]["value"] == pytest.approx(right_share(firsts, about))
    elif name == "mmstar":
        scored = [line for line in lines if "no picture, as" not in line.get("error", "")]
        wrong = {made.NO_OPTION, made.NO_ANSWER}  # a letter that is not among the options
        right = [
            "error" not in line
            and about(line["meta"]) % 5 != 0
            and about(line["meta"]) not in wrong
            for line in scored
        ]
        assert part["metrics"][0]["value"] == pytest.approx(100 * sum(right) / len(right))
    else:
        assert part["metrics"][0]["value"] == pytest.approx(right_share(lines, about))
        assert part["metrics"][0]["value"] == pytest.approx(80.0)
    assert evaluate(Plan(name, data, out), MODEL, None)  # no row is left to ask


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the malformed TSV, and its data."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("run")
    made.write_tsv(data)
    evaluate(Plan("mmstar", data, out), MODEL, made.serve)
    return data, out


def test_malformed_rows_are_named_and_scored_as_officially(finished):
    part = report_of(finished[1], "mmstar")
    problems = {problem["row"] - 1: problem["problem"] for problem in part["problems"]}
    assert {p["row"] - 1: p["index"] for p in part["problems"]} == {n: str(n) for n in problems}
    assert "not asked and not scored" in problems.pop(made.NO_IMAGE)
    assert "bad base64" in problems.pop(made.BAD_BASE64)
    assert problems.pop(made.NO_ANSWER) == "no right answer in the file"
    assert "not an image" in problems.pop(made.NOT_AN_IMAGE)
    assert not problems  # a missing option is no problem: the prompt leaves it out
    lines = {int(line["meta"]["index"]): line for line in lines_of(finished[1], "mmstar")}
    assert made.right_letter(made.NO_OPTION) not in lines[made.NO_OPTION]["meta"]
    # Officially a row without an image is dropped, all others are scored.
    assert part["scored"] == made.ROWS - 1
    assert f"row {made.BAD_BASE64 + 1} (index {made.BAD_BASE64})" in read_report(finished[1])


def read_report(out):
    return (out / "report.md").read_text()


def test_the_report_says_all_there_is(finished):
    _, out = finished
    part = report_of(out, "mmstar")
    head = part["metrics"][0]
    assert head["low"] < head["value"] < head["high"]
    assert {metric["name"] for metric in part["metrics"]} >= {"all", "kind 0", "kind 1", "kind 2"}
    assert part["published"] == {"2B": 58.6, "9B": 67.3}
    assert part["finish_reasons"] == {"stop": 197, "error": 3}
    assert sum(part["lengths"]["prompt"].values()) == 197
    assert part["lengths"]["completion"] == {"2-3": 197}
    assert part["throughput"]["rows_per_second"] > 0
    assert part["settings"]["max_new_tokens"] == 4096
    assert "| MMStar |" in read_report(out)
    for name in ("scores", "mmstar"):
        assert (out / f"plots/{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert page.count("<article") == 98  # every second row, except two without an image
    assert "&quot;it&quot;" in page
    assert "class=wrong" in page and "data:image/jpeg;base64," in page
    assert not re.search(r'(?:src|href)=(?!"data:)', page)


def test_scores_are_made_anew_without_model_or_data(finished, tmp_path):
    before = json.loads((finished[1] / "report.json").read_text())
    copy = tmp_path / "run"
    shutil.copytree(finished[1], copy)
    (copy / "report.json").unlink()
    score_run(copy)
    assert json.loads((copy / "report.json").read_text()) == before
    with raises("no predictions there"):
        score_run(tmp_path)


def test_a_changed_setting_is_refused_and_says_which(finished, tmp_path):
    data, out = finished
    for plan, model, message in (
        (Plan("mmstar", data, out, "official"), MODEL, "preset: was 'greedy', now 'official'"),
        (Plan("mmstar", data, out, overrides=["seed=3"]), MODEL, "settings.seed: was 0, now 3"),
        (Plan("mmstar", data, out), {"directory": "other"}, "directory: was 'made', now 'other'"),
    ):
        with raises(message, "its answers used different settings", "choose another --out"):
            evaluate(plan, model, made.serve)
    made.write_tsv(tmp_path, rows=50)
    with raises("data.rows: was 200, now 50"):
        evaluate(Plan("mmstar", tmp_path, out), MODEL, made.serve)
    part = json.loads((out / "mmstar/settings.json").read_text())
    assert part["settings"]["preset"] == "greedy"


def test_a_limit_can_grow_and_errors_be_asked_again(tmp_path):
    made.write_tsv(tmp_path)
    out = tmp_path / "run"
    for limit, wanted in ((30, 30), (50, 50), (10, 50)):
        evaluate(Plan("mmstar", tmp_path, out, limit=limit), MODEL, made.serve)
        assert len(lines_of(out, "mmstar")) == wanted
    retried = []

    def again(requests):
        for number, request in enumerate(requests):
            retried.append(request)
            yield number, made.answer(request)

    plan = Plan("mmstar", tmp_path, out, limit=110, retry_errors=True)
    evaluate(plan, MODEL, made.serve)
    evaluate(plan, MODEL, again)
    assert len(retried) == 1  # the bytes that are not an image; the other rows have no request
    assert len(lines_of(out, "mmstar")) == 110


def test_rows_that_no_scorer_can_place_are_left_out_and_named(tmp_path):
    columns = ["index", "question", "task", "answer", "image"]
    tasks = ["depth_prediction_oc", "no_such_task", "position_matching", ""]
    rows = [[n, "Q", task, "A", made.text64(4 * n)] for n, task in enumerate(tasks)]
    made.write_table(tmp_path / "SparBench.tsv", columns, rows)
    (scored,) = evaluate(Plan("spar", tmp_path, tmp_path / "run"), MODEL, made.serve)
    assert {p["row"]: p["problem"][:30] for p in scored.problems} == {
        2: "left out, cannot be scored: ta",
        4: "left out, cannot be scored: no",
    }
    assert [one.verdict.score for one in scored.scored_rows] == [0, 1]
    rows = [[index, "Is it?", "c", "Yes", made.text64(4)] for index in ("VD_a_x_1_0_0", "7")]
    made.write_table(tmp_path / "HallusionBench.tsv", columns, rows)
    evaluate(Plan("hallusion", tmp_path, tmp_path / "run"), MODEL, made.serve)
    assert "index '7': not of six parts" in read_report(tmp_path / "run")


def test_a_damaged_file_of_answers_is_named(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished[1], copy)
    path = copy / "mmstar/predictions.jsonl"
    path.write_bytes(path.read_bytes() + b"{}\n")
    with raises("predictions.jsonl:201: not an answer"):
        score_run(copy)
    with raises("predictions.jsonl:201: not an answer"):
        evaluate(Plan("mmstar", finished[0], copy), MODEL, made.serve)


def test_a_new_benchmark_is_one_row_of_the_table(tmp_path, monkeypatch):
    row = benchmarks._choice("mine", "Mine", "Mine", (50.0, 60.0), ask=prompts.briefly)
    monkeypatch.setitem(benchmarks.BENCHMARKS, "mine", row)
    made.write_tsv(tmp_path, rows=20)
    (tmp_path / "MMStar.tsv").rename(tmp_path / "mine.tsv")
    (scored,) = evaluate(Plan("mine", tmp_path, tmp_path / "run"), MODEL, made.serve)
    assert scored.metrics[0].value == pytest.approx(80)
    assert "| Mine | 80.00 |" in read_report(tmp_path / "run")


def test_wrong_files_and_folders_are_named(tmp_path):
    def run(names="mmstar", data=tmp_path, **options):
        evaluate(Plan(names, data, tmp_path / "run", **options), MODEL, made.serve)

    with raises("nothing there for mmstar: put MMStar.tsv", "from https://"):
        run()
    with raises("nowhere: no such folder"):
        run(data=tmp_path / "nowhere")
    (tmp_path / "MMStar.tsv").write_text("index\tquestion\n1\ta\n2\ta\tb\n")
    with raises("MMStar.tsv, row 2: 3 cells, but 2 columns"):
        run()
    (tmp_path / "MMStar.tsv").write_text("index\tquestion\n")
    with raises("MMStar.tsv: no rows in it"):
        run()
    (tmp_path / "MMStar.tsv").write_bytes(b"index\tquestion\n1\t\xff\xfe\n")
    with raises("MMStar.tsv: cannot be read"):
        run()
    (tmp_path / "MMStar.tsv").unlink()
    (tmp_path / "MMStar").mkdir()
    with raises("MMStar: one kind of .tsv, .parquet, .jsonl, .json is needed in it, not none"):
        run()
    (tmp_path / "MMStar/a.parquet").write_bytes(b"PAR1 not")
    with raises("MMStar: cannot be read"):
        run()
    with raises("one file, but 2 benchmarks"):
        run("mmstar,ai2d", data=tmp_path / "MMStar/a.parquet")
    assert not (tmp_path / "run").exists()
