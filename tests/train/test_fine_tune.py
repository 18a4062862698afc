"""From a plain Qwen3 to an answer about a photograph, through the commands users type."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

import infer
from helpers import commands
from helpers.golden import GOLDEN

PHOTO = Path(find_spec("matplotlib").origin).parent / "mpl-data/sample_data/grace_hopper.jpg"
QUESTION, ANSWER = "Who is this?", "Rear admiral Grace Hopper."


@pytest.mark.slow
def test_grow_fine_tune_export_and_ask(tmp_path, capsys):
    qwen3, images = tmp_path / "qwen3", tmp_path / "images"
    shutil.copytree(GOLDEN / "qwen3_init/untied/qwen3", qwen3)
    for path in (GOLDEN / "single_image/hf").glob("*token*"):
        shutil.copy(path, qwen3)
    images.mkdir()
    photo = Image.open(PHOTO)
    photo.save(images / "whole.jpg")
    photo.crop((100, 50, 400, 350)).save(images / "face.png")
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    records = [{"image": f"images/{p.name}", "conversations": turns} for p in images.iterdir()]
    (tmp_path / "photos.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    grown, run, hf = (str(tmp_path / name) for name in ("grown", "run", "hf"))
    growth = ["--pre-buffer", "1", "--vocab-size", "640", "--dtype", "float32"]
    assert commands.from_qwen3([str(qwen3), grown, *growth]) == 0
    config = tmp_path / "config.py"
    config.write_text(
        "from neo_jax.data.pipeline import DataConfig\n"
        "from neo_jax.train.train_config import Config\n"
        "from neo_jax.train.optimizer import OptimConfig\n"
        "def get_config():\n"
        "    data = DataConfig(length=96, num_patches=160, rows=2, min_pixels=4096,\n"
        "                      max_pixels=16384, packing_rows=2)\n"
        "    optim = OptimConfig(peak_lr=1e-2, warmup_steps=5)\n"
        "    return Config(data=data, optim=optim, steps=60, dtype='float32', mesh=(1, 1, 1),\n"
        "                  remat='none')\n"
    )
    settings = [f"start={grown}", f"data.mixture={tmp_path / 'photos.jsonl'}", f"workdir={run}"]
    assert commands.train([str(config), *settings]) == 0
    assert commands.to_hf([run, hf]) == 0
    capsys.readouterr()
    ask = ["--image", str(images / "whole.jpg"), "--max-pixels", "16384", "--min-pixels", "4096"]
    for model in (run, hf):
        line = ["ask", "--model", model, "--dtype", "float32", *ask, QUESTION]
        assert infer.main(line) == 0
        assert capsys.readouterr().out.strip() == ANSWER
