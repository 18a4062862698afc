"""Whole runs: the same losses however often they are stopped, and on any mesh they resume on."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import neo_jax
from helpers import commands
from helpers.golden import ROOT, raises
from helpers.tolerance import assert_close
from helpers.training import CONFIG, GOLDEN_RUN, losses
from neo_jax.train.loop import train
from neo_jax.train.train_config import LoraConfig, override, to_json


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    finished = train(dataclasses.replace(CONFIG, workdir=str(workdir)))
    return workdir, finished


@pytest.mark.slow
def test_a_run_learns_and_its_folder_is_a_checkpoint(unbroken):
    workdir, finished = unbroken
    found = losses(workdir)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert found[6] < found[1] - 1
    neo = neo_jax.load(workdir, dtype="float32", mesh=(1, 1, 1))
    jax.tree.map(np.testing.assert_array_equal, neo.params, finished.params)
    run = json.loads((workdir / "run.json").read_text())
    assert run["config"] == json.loads(to_json(dataclasses.replace(CONFIG, workdir=str(workdir))))
    assert {"jax", "grain", "python"} <= run["versions"].keys()
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4", "6"]
    assert list((workdir / "tensorboard").iterdir())


def stopped(workdir, at, **changes):
    """A run that gets SIGTERM once it has logged step `at`."""

    def log(message):
        if message.startswith(f"step {at}:"):
            os.kill(os.getpid(), signal.SIGTERM)

    config = dataclasses.replace(CONFIG, workdir=str(workdir), **changes)
    return train(config, log)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2), (1, 8, 1)], ids=str)
def test_a_terminated_run_goes_on_as_if_nothing_had_happened(unbroken, mesh, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    first = stopped(tmp_path.name, 3)
    assert first.is_stopped
    assert 3 < first.step < 6
    second = train(dataclasses.replace(CONFIG, workdir=str(tmp_path), mesh=mesh))
    assert not second.is_stopped
    found, wanted = losses(tmp_path), losses(unbroken[0])
    if mesh == (1, 1, 1):
        assert found == wanted
    else:
        np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-5)


@pytest.mark.slow
def test_a_killed_run_loses_nothing(tmp_path):
    """Five kills at random moments; every step's loss has the bits of an unbroken run's."""
    script = tmp_path / "config.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import jax\n"
        "jax.config.update('jax_platforms', 'cpu')\n"
        "jax.config.update('jax_compilation_cache_dir', "
        f"{jax.config.jax_compilation_cache_dir!r})\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "import dataclasses\n"
        "from helpers.training import CONFIG\n"
        "def get_config():\n"
        "    return dataclasses.replace(CONFIG, save_every=1, steps=16)\n"
    )
    line = [sys.executable, str(ROOT / "train.py"), str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run([*line, f"workdir={whole}", "profile=1,1"], check=True, **quiet)
    assert list((whole / "profile").rglob("*.xplane.pb"))
    rng, kills = np.random.default_rng(0), 0
    for _ in range(30):
        process = subprocess.Popen([*line, f"workdir={broken}"], **quiet)
        begin, metrics = _size(broken / "metrics.jsonl"), broken / "metrics.jsonl"
        while process.poll() is None and _size(metrics) == begin:
            time.sleep(0.01)
        if process.poll() is None and kills < 5:
            time.sleep(rng.uniform(0, 0.3))
            process.kill()
            kills += process.wait() == -signal.SIGKILL
        elif process.wait() == 0:
            break
    assert kills == 5
    assert losses(broken) == losses(whole)
    assert len(losses(whole)) == 16


def _size(path):
    return path.stat().st_size if path.exists() else 0


@pytest.mark.slow
def test_records_that_cannot_be_used_are_left_out_counted_and_named(tmp_path):
    bad = [{"image": "gone.png", "conversations": [{"from": "gpt", "value": "x"}]}, {"no": 1}]
    lines = (GOLDEN_RUN / "data.jsonl").read_text().splitlines() + [json.dumps(one) for one in bad]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    shutil.copytree(GOLDEN_RUN / "images", tmp_path / "images")
    data = dataclasses.replace(CONFIG.data, mixture=str(tmp_path / "data.jsonl"), max_bad_share=0.5)
    held_out = str(GOLDEN_RUN / "data.jsonl")
    config = dataclasses.replace(CONFIG, data=data, workdir=str(tmp_path / "run"), steps=3)
    config = dataclasses.replace(config, held_out=held_out, eval_batches=2)
    train(config)
    *_, row, last = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert last["step"] == 3
    assert 0 < last["held_out_loss"] < 8
    assert 0.2 < row["records_bad"] / row["records"] < 0.45
    reasons = (tmp_path / "run/bad_records_0.jsonl").read_text()
    assert f"{tmp_path}/data.jsonl:5" in reasons
    assert f"{tmp_path}/data.jsonl:6" in reasons
    assert len(reasons.splitlines()) == row["records_bad"]
    data = dataclasses.replace(data, max_bad_share=0.1)
    with raises("of .* records cannot be used", "max_bad_share=0.1", "bad_records_0.jsonl"):
        train(dataclasses.replace(config, data=data, workdir=str(tmp_path / "strict"), steps=50))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_with_its_records(tmp_path):
    optim = dataclasses.replace(CONFIG.optim, peak_lr=1e30)
    with raises("step [23]: loss is", "nothing of it was saved", "data.jsonl:[1234]"):
        train(dataclasses.replace(CONFIG, optim=optim, workdir=str(tmp_path), save_every=1))
    saved = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert saved <= {"1", "2"}


def test_another_configuration_does_not_go_on_with_a_run(unbroken, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    other = dataclasses.replace(CONFIG, workdir=str(workdir), seed=7, log_every=3)
    with raises("holds a run with other settings", "seed was 0, is now 7"):
        train(other)
    again = train(dataclasses.replace(CONFIG, workdir=str(workdir), log_every=3))
    assert again.step == 6


def test_a_run_that_an_earlier_version_began_is_resumed(unbroken, tmp_path):
    """Its settings have their earlier names; the trainable parameters still have that on disk."""
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    run = json.loads((workdir / "run.json").read_text())
    run["config"]["trained"] = run["config"].pop("trainable")
    (workdir / "run.json").write_text(json.dumps(run))
    for step in (2, 4, 6):
        assert '"trained"' in (workdir / f"checkpoints/{step}/optimizer/_METADATA").read_text()
    again = train(dataclasses.replace(CONFIG, workdir=str(workdir)))
    assert again.step == 6
    jax.tree.map(np.testing.assert_array_equal, again.params, unbroken[1].params)
    with raises(r"trainable was \['\.\*'\], is now \['pre_buffer/\.\*'\]"):
        train(dataclasses.replace(CONFIG, workdir=str(workdir), trainable=("pre_buffer/.*",)))


@pytest.mark.slow
def test_lora_trains_little_saves_little_and_exports(unbroken, tmp_path, capsys):
    config = dataclasses.replace(CONFIG, lora=LoraConfig(rank=2), workdir=str(tmp_path / "run"))
    stopped(tmp_path / "run", 3, lora=config.lora)
    assert commands.to_hf([str(tmp_path / "run"), str(tmp_path / "x")]) == 2
    assert "a LoRA run: add --merge-lora" in capsys.readouterr().err
    finished = train(config)
    found = losses(tmp_path / "run")
    first = losses(unbroken[0])[1]
    assert found[1] == pytest.approx(first, rel=2e-6)  # it starts as the model that it adapts
    assert found[6] < found[1]
    sizes = [sum(p.stat().st_size for p in (folder / "checkpoints/6").rglob("*") if p.is_file())
             for folder in (tmp_path / "run", unbroken[0])]  # fmt: skip
    assert sizes[0] < sizes[1] / 2
    neo = neo_jax.load(tmp_path / "run", dtype="float32", mesh=(1, 1, 1))
    start = neo_jax.load(GOLDEN_RUN / "hf", dtype="float32", mesh=(1, 1, 1))
    changed = {
        "/".join(entry.key for entry in path)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(neo.params),
            jax.tree.leaves(start.params),
            strict=True,
        )
        if (np.asarray(a) != np.asarray(b)).any()
    }
    names = ("q_t_dnh", "q_hw_dnh", "k_t_dkh", "k_hw_dkh", "v_dkh", "o_nhd")
    assert changed == {f"{s}/attention/{n}" for s in ("pre_buffer", "post_llm") for n in names}
    assert (
        commands.to_hf(
            [str(tmp_path / "run"), str(tmp_path / "hf"), "--merge-lora", "--dtype", "f32"]
        )
        == 0
    )
    back = neo_jax.load(tmp_path / "hf", dtype="float32", mesh=(1, 1, 1))
    jax.tree.map(np.testing.assert_array_equal, back.params, neo.params)
    assert_close(finished.params, neo.params, 2e-6)


def test_settings_are_checked_by_name_and_type():
    c = override(CONFIG, ["optim.peak_lr=1e-5", "mesh=1,2,4", "data.mixture=a.jsonl,b.parquet"])
    assert (c.optim.peak_lr, c.mesh, c.data.mixture) == (1e-5, (1, 2, 4), "a.jsonl,b.parquet")
    for name in ("trainable", "trained"):  # the second is its earlier name
        assert override(CONFIG, [f"{name}=pre_buffer/.*"]).trainable == ("pre_buffer/.*",)
    with raises("optim.peek_lr: no setting 'peek_lr'; did you mean 'peak_lr'"):
        override(CONFIG, ["optim.peek_lr=1"])
    with raises("steps: 'many' is not int"):
        override(CONFIG, ["steps=many"])
    with raises("give data, fsdp, tensor and perhaps context"):
        override(CONFIG, ["mesh=1,2"])
    with raises("write name=value"):
        override(CONFIG, ["steps"])
    with raises("multiple of micro_batches"):
        override(CONFIG, ["micro_batches=3"])
    with raises("too coarse", "0.999"):
        override(CONFIG, ["optim.betas=(0.9,0.999)", "optim.state_dtype=bfloat16"])


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    for arguments, message in (
        (["configs/nothing.py"], "no such config"),
        (["stepz=3"], "did you mean 'steps'"),
        (["data.mixture=nowhere.jsonl", f"workdir={tmp_path}/x"], "nowhere.jsonl: no such file"),
        (["data.mixture=", f"workdir={tmp_path}/x"], "mixture is empty"),
        (["workdir="], "name a folder"),
        (["mesh=3,1,1", f"workdir={tmp_path}/x"], "does not divide 8 devices"),
        (["mesh=0,1,1", f"workdir={tmp_path}/x"], "does not divide 8 devices"),
        (["mesh=1,1,8", f"workdir={tmp_path}/x"], "does not divide"),
        (["attention=pallas", f"workdir={tmp_path}/x"], "runs on TPUs"),
        (["held_out=nowhere.jsonl", f"workdir={tmp_path}/x"], "nowhere.jsonl: no such file"),
        (["start=nowhere", f"workdir={tmp_path}/x"], "give either start"),
    ):
        assert commands.train(arguments) == 2
        assert message in capsys.readouterr().err
    assert commands.train(["--show", "steps=77"]) == 0
    assert '"steps": 77' in capsys.readouterr().out
    pod = ["configs/neo_ov_2b_sft.py", "--pod", "v5e-256", "steps=78", "--show"]
    assert commands.train(pod) == 0
    shown = capsys.readouterr().out
    assert '"steps": 78' in shown
    assert '"remat": "attention"' in shown
