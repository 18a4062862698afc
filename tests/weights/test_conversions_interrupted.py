"""Conversions that are killed, run out of disk or read damaged files: writes are atomic."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.random_checkpoint import write_checkpoint
from helpers import commands
from helpers.conversions import assert_same_tensors, run
from helpers.golden import GOLDEN, ROOT, raises
from neo_jax.configs.models import TINY
from neo_jax.convert import from_hf
from neo_jax.weights import directory as directory_module
from neo_jax.weights.directory import new_directory

# A conversion that pauses before each piece, so that a kill can come anywhere.
_SLOW = """
import sys, time
from neo_jax.weights.row import Row
def slowly(original):
    def call(*arguments):
        time.sleep(0.05)
        return original(*arguments)
    return call
Row.read, Row.write = slowly(Row.read), slowly(Row.write)
from neo_jax.convert import from_hf, to_hf
print("ready", flush=True)
sys.exit({"from_hf": from_hf, "to_hf": to_hf}[sys.argv[1]].main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    write_checkpoint(directory / "hf", TINY, dtype="F32")
    run(commands.from_hf, directory / "hf", directory / "ours")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("command", ["from_hf", "to_hf"])
def test_a_killed_conversion_leaves_nothing_that_looks_complete(command, source, tmp_path, capfd):
    start = source / ("hf" if command == "from_hf" else "ours")
    target, rng = tmp_path / "out", np.random.default_rng(0)
    arguments = [sys.executable, "-c", _SLOW, command, str(start), str(target)]
    killed = 0
    partial = target.with_name(".out.partial")
    for delay in rng.uniform(0, 0.3, size=5):
        process = subprocess.Popen(
            arguments, cwd=ROOT, stdout=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"}
        )
        assert process.stdout.readline() == b"ready\n"
        while process.poll() is None and not partial.exists():
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += process.returncode == -signal.SIGKILL
        assert not target.exists()
    assert killed == 5
    assert partial.exists()
    capfd.readouterr()
    run(getattr(commands, command), start, target)
    assert "left by a run that did not finish; starting over" in capfd.readouterr().err
    if command == "from_hf":
        run(commands.to_hf, target, tmp_path / "back")
        target = tmp_path / "back"
    assert_same_tensors(target, source / "hf")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_an_existing_destination_is_refused_without_overwrite(source, tmp_path, capsys):
    run(commands.from_hf, source / "hf", tmp_path / "out")
    marker = tmp_path / "out/marker"
    marker.write_text("mine")
    assert commands.from_hf([source / "hf", tmp_path / "out"]) == 2
    assert "exists: choose another place or allow to overwrite" in capsys.readouterr().err
    assert marker.exists()
    run(commands.from_hf, source / "hf", tmp_path / "out", "--overwrite")
    assert not marker.exists()
    assert commands.from_hf([source / "hf", source / "hf", "--overwrite"]) == 2
    assert "SRC and DST are the same or inside" in capsys.readouterr().err
    assert (source / "hf/model.safetensors").exists()


def test_a_failed_overwrite_keeps_what_was_there(source, tmp_path):
    broken = shutil.copytree(source / "hf", tmp_path / "broken")
    run(commands.from_hf, source / "hf", tmp_path / "out")
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert commands.from_hf([broken, tmp_path / "out", "--overwrite"]) == 2
    run(commands.to_hf, tmp_path / "out", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", source / "hf")


def test_a_disk_without_room_is_noticed_before_writing(source, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(directory_module.shutil, "disk_usage", lambda path: usage)
    for command, start in ((commands.from_hf, "hf"), (commands.to_hf, "ours")):
        assert command([source / start, tmp_path / "out"]) == 2
        assert "GB, only 0.0 GB are free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="needs to mount")
@pytest.mark.parametrize("command", ["from_hf", "to_hf"])
def test_a_disk_that_fills_up_leaves_nothing(command, source, tmp_path, monkeypatch, capsys):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", small])
    if mounted.returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        usage = shutil.disk_usage(tmp_path)  # the small disk seems to have room
        monkeypatch.setattr(directory_module.shutil, "disk_usage", lambda path: usage)
        start = source / ("hf" if command == "from_hf" else "ours")
        assert getattr(commands, command)([start, small / "out"]) == 2
        assert "No space left" in capsys.readouterr().err
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="needs to mount")
def test_a_read_only_disk_is_named(source, tmp_path, capsys):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path])
    if mounted.returncode:
        pytest.skip("cannot mount a read-only disk here")
    try:
        for command, start in ((commands.from_hf, "hf"), (commands.to_hf, "ours")):
            assert command([source / start, tmp_path / "out"]) == 2
            error = capsys.readouterr().err
            assert "cannot write: " in error
            assert "Read-only file system" in error
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_destination_that_cannot_be_written(source, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert commands.from_hf([source / "hf", tmp_path / "file/out"]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_nothing_that_is_read_is_overwritten(source, tmp_path, capsys):
    outer = shutil.copytree(source, tmp_path / "outer")
    for target in (outer, outer / "hf/inner"):
        assert commands.from_hf([outer / "hf", target, "--overwrite"]) == 2
        assert "inside each other" in capsys.readouterr().err
    assert (outer / "hf/model.safetensors").exists()
    (tmp_path / "link").symlink_to(outer)
    assert commands.from_hf([source / "hf", tmp_path / "link", "--overwrite"]) == 2
    assert "no directory of its own" in capsys.readouterr().err
    assert commands.to_hf([source / "ours", "s3://bucket/y"]) == 2
    assert "only local directories" in capsys.readouterr().err


def test_a_second_run_on_one_target_is_refused(tmp_path):
    with new_directory(tmp_path / "out", 0) as first:
        (first / "mine").write_text("x")
        with raises("another run is writing it"), new_directory(tmp_path / "out", 0):
            raise AssertionError("must not get here")
    assert (tmp_path / "out/mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_replacement_that_was_stopped_halfway_is_put_back(tmp_path):
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced/kept").write_text("x")
    with raises("out exists"), new_directory(tmp_path / "out", 0):
        raise AssertionError("must not get here")
    assert (tmp_path / "out/kept").exists()


def test_an_interrupt_cleans_up(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "out", 0) as directory:
        (directory / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_of_ours_is_named(source, tmp_path, capsys):
    damaged = shutil.copytree(source / "ours", tmp_path / "ours")
    (damaged / "params/manifest.ocdbt").write_bytes(b"damage")
    assert commands.to_hf([damaged, tmp_path / "out"]) == 2
    assert "ours/params: cannot read" in capsys.readouterr().err
    shutil.rmtree(damaged / "params")
    assert commands.to_hf([damaged, tmp_path / "out"]) == 2
    assert "no checkpoint of ours" in capsys.readouterr().err
    shutil.copytree(source / "ours/params", damaged / "params")
    (damaged / "neo_jax.json").write_text('{"format": 7}')
    assert commands.to_hf([damaged, tmp_path / "out"]) == 2
    assert "format 7; this version reads 1" in capsys.readouterr().err
    (damaged / "neo_jax.json").unlink()
    assert commands.to_hf([damaged, tmp_path / "out"]) == 2
    assert "has params but no neo_jax.json" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(source, tmp_path, capsys):
    other = shutil.copytree(source / "ours", tmp_path / "ours")
    text = (other / "neo_jax.json").read_text()
    (other / "neo_jax.json").write_text(
        text.replace('"intermediate_size": 128', '"intermediate_size": 256')
    )
    assert commands.to_hf([other, tmp_path / "out"]) == 2
    err = capsys.readouterr().err
    assert "pre_buffer/mlp/gate_df: (1, 64, 128), the model has (1, 64, 256)" in err


def test_damage_found_while_converting_is_named(tmp_path, capsys, monkeypatch):
    """The file is cut after its header has been read."""
    source = shutil.copytree(GOLDEN / "single_image/hf", tmp_path / "hf")
    path = source / "model.safetensors"
    opened = from_hf.open_published

    def open_then_cut(directory):
        result = opened(directory)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return result

    monkeypatch.setattr(from_hf, "open_published", open_then_cut)
    assert commands.from_hf([source, tmp_path / "out"]) == 2
    assert "model.safetensors: cannot read" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_qwen3_that_does_not_fit_is_listed(tmp_path, capsys):
    source = shutil.copytree(GOLDEN / "qwen3_init/untied/qwen3", tmp_path / "qwen3")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    save_file(tensors, source / "model.safetensors")
    assert commands.from_qwen3([source, tmp_path / "out", "--pre-buffer", "1"]) == 2
    err = capsys.readouterr().err
    assert "missing: model.layers.0.mlp.up_proj.weight" in err
    assert "unknown: model.layers.9.mlp.up_proj.weight" in err


def test_directories_are_checked_before_anything_is_written(tmp_path):
    (tmp_path / "out").mkdir()
    with raises("out exists"), new_directory(tmp_path / "out", 0):
        raise AssertionError("must not get here")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
