"""The end of the demo: scores of held-out questions, and the files it leaves."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from neo_jax.demo.demo_report import report
from neo_jax.demo.held_out import ask_held_out, scores

KINDS = {"caption", "colour", "shape", "place", "digit", "count", "binding", "relation", "change"}


class RedIfSeen:
    """Answers "red" about every image that is not blank."""

    def generate(self, requests, **_):
        return [SimpleNamespace(text="red" if self._is_seen(r) else "blank") for r in requests]

    def _is_seen(self, request):
        return any(np.ptp(np.asarray(image)) for image in request.images or request.video)


def test_scores_are_of_seen_and_blank_images():
    answers = ask_held_out(RedIfSeen(), per_kind=30)
    assert {(one.answer, one.blind_answer) for one in answers} == {("red", "blank")}
    table = scores(answers)
    assert table.keys() == KINDS | {"motion"}
    for kind, row in table.items():
        truths = [one.truth for one in answers if one.kind == kind]
        assert row["questions"] == len(truths) == 30
        assert row["accuracy"] == pytest.approx(truths.count("red") / 30)
        assert row["majority"] == pytest.approx(max(map(truths.count, truths)) / 30)
        assert row["blind"] == 0
    assert table["colour"]["accuracy"] > 0
    assert table["shape"]["accuracy"] == 0


def test_a_report_leaves_scores_and_figures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    table = report(RedIfSeen(), str(tmp_path), per_kind=2)
    assert json.loads((tmp_path / "held_out.json").read_text()) == table
    assert "held out" in capsys.readouterr().out
    for name in ("answers.png", "loss.png", "example.png"):
        assert min(Image.open(tmp_path / name).size) >= 96
