"""The default evaluation with the pool of a small TPU: real lengths, through tiny layers."""

import json

import pytest

import infer
from helpers import made_benchmarks as made
from helpers.golden import GOLDEN
from neo_jax.infer import engine_core

# What `choose_pool` gives the 2B model in bfloat16 on a v5e-1 (tests/infer/test_engine_plans.py).
LANES, POOL_TOKENS = 18, 38272


class ShortAnswer(engine_core.Answer):
    """Answers are cut short, as a trained model's are; there is still room for 4096 tokens."""

    def add(self, token):
        if len(self.token_ids) == 2:
            self._stop_ids = {token}
        return super().add(token)


@pytest.mark.slow
def test_images_of_1_3_million_pixels_are_answered_without_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_core, "Answer", ShortAnswer)
    made.write_tsv(tmp_path, rows=20)
    line = ["eval", "--model", str(GOLDEN / "generate/hf"), "--dtype", "float32"]
    line += ["--bench", "mmstar", "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    line += ["--slots", str(LANES), "--pool-tokens", str(POOL_TOKENS)]
    assert infer.main(line) == 0
    lines = (tmp_path / "run/mmstar/predictions.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert len(answers) == 20
    assert [answer for answer in answers if "error" in answer] == []
    assert all(1280 <= answer["usage"]["prompt_tokens"] < 1600 for answer in answers)
    settings = json.loads((tmp_path / "run/mmstar/settings.json").read_text())
    assert settings["settings"]["max_new_tokens"] == 4096
