"""scripts/tpu.sh, with a `gcloud` that runs each host's command in a folder of its own."""

import os
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/tpu.sh"
# ssh NAME ... --command=C: for both workers of the slice.
GCLOUD = """#!/usr/bin/env bash
for last; do :; done
for worker in 0 1; do
  (cd "$HOSTS/$5-$worker" && bash -c "${last#--command=}") || exit 1
done
"""
# A stand-in for Python: prints its flags and arguments, then waits for SIGTERM.
PYTHON = """#!/usr/bin/env bash
trap 'echo terminated; exit 143' TERM
echo "$LIBTPU_INIT_ARGS: $*"
while true; do sleep 0.05; done
"""


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    folders = [tmp_path / f"slice-{number}-{worker}" for number in "01" for worker in "01"]
    for folder in folders:
        _write(folder / "neo_jax/.venv/bin/python", PYTHON)
    _write(tmp_path / "bin/gcloud", GCLOUD)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    settings = {"HOSTS": tmp_path, "TPU_NAME": "slice", "ZONE": "z", "SLICES": 2}
    for name, value in (settings | {"LIBTPU_INIT_ARGS": "--flag"}).items():
        monkeypatch.setenv(name, str(value))
    return folders


def _write(path, text):
    path.parent.mkdir(parents=True)
    path.write_text(text)
    path.chmod(0o755)


def _wait_for(path, words):
    for _ in range(200):
        if path.exists() and words in path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path}: no {words!r}")


def test_a_run_starts_on_all_hosts_and_stop_ends_it_itself(hosts):
    subprocess.run([SCRIPT, "run", "train.py", "a.py", "mesh=(1, 2, 1)"], check=True, timeout=60)
    for host in hosts:
        _wait_for(host / "neo_jax/run.log", "--flag: train.py a.py mesh=(1, 2, 1)\n")
    subprocess.run([SCRIPT, "stop"], check=True, timeout=60)
    for host in hosts:
        _wait_for(host / "neo_jax/run.log", "terminated")


def test_the_log_is_the_first_hosts(hosts):
    for number, host in enumerate(hosts):
        (host / "neo_jax/run.log").write_text(f"old\nhost {number}\n")
    ended = subprocess.run([SCRIPT, "log", "1"], check=True, capture_output=True, text=True)
    assert ended.stdout.startswith("host 0\n")


def test_help_and_what_is_missing(hosts, monkeypatch):
    ended = subprocess.run([SCRIPT], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "scripts/tpu.sh run train.py" in ended.stdout
    monkeypatch.delenv("ZONE")
    ended = subprocess.run([SCRIPT, "stop"], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "ZONE" in ended.stderr
