"""infer.py as a user runs it: an answer, or one line and exit code 2."""

import json
import os
import subprocess
import sys

import pytest

import infer
from helpers.golden import GOLDEN, ROOT, load_case

MODEL = str(GOLDEN / "generate/hf")
HUGE = ("--min-pixels", "10000000000", "--max-pixels", "10000000000")
IMAGE = str(GOLDEN / "generate/images/image_0.png")


def test_ask_prints_the_answer(capsys):
    asked = ["ask", "--model", MODEL, "--image", IMAGE, "--max-new-tokens", "5", "What is this?"]
    assert infer.main([*asked, "--dtype", "float32"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert len(out) > 3
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "/absent"], "/absent: no such directory"),
        (["--model", MODEL, "--image", "/absent.jpg"], "image /absent.jpg: no such file"),
        (["--model", MODEL, "--image", IMAGE, "--image", IMAGE], "1 <image> marks, but 2 images"),
        (["--model", MODEL, "--max-new-tokens", "50000"], "context of 40960"),
        (["--model", MODEL, "--image", IMAGE, *HUGE], "more than the context of 40960"),
    ],
)
def test_bad_input_gives_one_line_and_code_2(arguments, expected, capsys):
    assert infer.main(["ask", *arguments, "<image>" if "--image" in arguments else "Hi"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert err.startswith("infer.py: ")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_batch_answers_a_file_and_goes_on(tmp_path, capsys):
    lines = [{"id": "a", "prompt": "What is this?", "images": [IMAGE]}, {"id": "b", "prompt": "Hi"}]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ["batch", "--model", MODEL, "--dtype", "float32", "--max-new-tokens", "4"]
    asked += ["--slots", "2", "--max-length", "512", str(source), str(target)]
    assert infer.main(asked) == 0
    answers = {line["id"]: line for line in map(json.loads, target.read_text().splitlines())}
    assert sorted(answers) == ["a", "b"]
    whole = load_case("generate").chat("Hi", max_new_tokens=4)
    assert answers["b"]["text"] == whole
    target.write_text(target.read_text().splitlines(keepends=True)[0] + '{"id": "b", "te')
    assert infer.main(asked) == 0
    again = {line["id"]: line for line in map(json.loads, target.read_text().splitlines())}
    assert again == answers
    assert infer.main([*asked[:-2], str(tmp_path / "absent.jsonl"), str(target)]) == 2
    assert "absent.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["ask", "batch"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        infer.main([command, "--help"])
    assert stopped.value.code == 0
    assert f"example: python infer.py {command}" in capsys.readouterr().out


@pytest.mark.parametrize("line", [["infer.py", "--help"], ["infer.py", "eval", "--list"]], ids=str)
def test_a_reader_that_has_gone_is_no_error(line):
    """As in `neo-ov --help | head -1`: nothing on standard error."""
    reading, writing = os.pipe()
    os.close(reading)
    arguments = [sys.executable, *line]
    ended = subprocess.run(arguments, stdout=writing, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, b"")
