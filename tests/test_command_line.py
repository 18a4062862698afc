"""infer.py as a user runs it: an answer, or one line and exit code 2."""

import pytest
from conftest import GOLDEN

import infer

MODEL = str(GOLDEN / "generate/hf")
IMAGE = str(GOLDEN / "generate/images/image_0.png")


def test_ask_prints_the_answer(capsys):
    asked = ["ask", "--model", MODEL, "--image", IMAGE, "--max-new-tokens", "5", "What is this?"]
    assert infer.main([*asked, "--dtype", "float32"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert len(out) > 3
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "/absent"], "/absent: no such directory"),
        (["--model", MODEL, "--image", "/absent.jpg"], "image /absent.jpg: no such file"),
        (["--model", MODEL, "--image", IMAGE, "--image", IMAGE], "1 <image> marks, but 2 images"),
        (["--model", MODEL, "--max-new-tokens", "50000"], "context of 40960"),
    ],
)
def test_bad_input_gives_one_line_and_code_2(arguments, said, capsys):
    assert infer.main(["ask", *arguments, "<image>" if "--image" in arguments else "Hi"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.startswith("infer.py: ")
    assert err.count("\n") == 1


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        infer.main(["ask", "--help"])
    assert stopped.value.code == 0
    assert "example: python infer.py ask" in capsys.readouterr().out
