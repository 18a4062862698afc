"""`infer.py eval` with a real model: killed, resumed, and on two hosts as on one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

import infer
from helpers import made_benchmarks as made
from helpers.golden import GOLDEN, ROOT

MODEL = GOLDEN / "generate" / "hf"
SETTINGS = ("max_new_tokens=3", "min_pixels=1024", "max_pixels=4096")


def arguments(data, out, *more):
    names = [*("--bench", "mmstar,lvbench", "--data", str(data), "--out", str(out)), *more]
    sizes = ("--slots", "4", "--max-length", "512", "--dtype", "float32")
    return ["eval", "--model", str(MODEL), *names, *sizes, *SETTINGS]


def start(line, **variables):
    """Starts the command in a process of its own, with one device."""
    shared = jax.config.jax_compilation_cache_dir
    environment = os.environ | {
        **{"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": shared},
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **variables,
    }
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    line = [sys.executable, "infer.py", *line]
    return subprocess.Popen(line, cwd=ROOT, env=environment, **quiet)


def answers(out, name):
    lines = (out / name / "predictions.jsonl").read_bytes().splitlines()
    found = {line["id"]: line for line in map(json.loads, lines)}
    assert len(found) == len(lines)
    return {
        name: (line["text"], line["token_ids"], "error" in line) for name, line in found.items()
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    made.write_tsv(folder, rows=30)
    made.write_videos(folder, rows=6)
    return folder


@pytest.fixture(scope="module")
def one_host(data, tmp_path_factory):
    """A run in one process that is killed once and then continued."""
    out = tmp_path_factory.mktemp("run")
    process = start(arguments(data, out))
    path = out / "mmstar/predictions.jsonl"
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 9):
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = path.read_bytes()
    process = start(arguments(data, out))
    assert process.wait() == 0, process.stderr.read().decode()
    assert path.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    return out


@pytest.mark.slow
def test_the_command_goes_on_where_it_was_killed(one_host):
    found = answers(one_host, "mmstar")
    assert len(found) == 30
    assert [name for name, (_, _, is_error) in found.items() if is_error] == ["row 21"]
    assert all(len(ids) == 3 for _, ids, is_error in found.values() if not is_error)
    assert len({text for text, _, _ in found.values()}) > 3
    assert len(answers(one_host, "lvbench")) == 6
    parts = json.loads((one_host / "report.json").read_text())["benchmarks"]
    assert {part["name"]: part["scored"] for part in parts} == {"lvbench": 6, "mmstar": 29}
    assert all(part["throughput"]["rows_per_second"] > 0 for part in parts)


@pytest.mark.slow
def test_two_hosts_answer_as_one(one_host, data, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    hosts = [
        start(
            arguments(data, tmp_path),
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(number),
            JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo",
        )
        for number in range(2)
    ]
    for host in hosts:
        assert host.wait(timeout=300) == 0, host.stderr.read().decode()
    for name in ("mmstar", "lvbench"):
        assert answers(tmp_path, name) == answers(one_host, name)
        assert not list((tmp_path / name).glob("predictions.*.jsonl"))
        times = (tmp_path / name / "times.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["host"] for line in times) == [0, 1]
        metrics = [
            next(part["metrics"] for part in parts if part["name"] == name)
            for parts in (
                json.loads((out / "report.json").read_text())["benchmarks"]
                for out in (tmp_path, one_host)
            )
        ]
        assert metrics[0] == metrics[1]


def test_scoring_alone_needs_no_model(one_host, capsys):
    before = (one_host / "report.json").read_bytes()
    assert infer.main(["eval", "--out", str(one_host), "--score-only"]) == 0
    assert (one_host / "report.json").read_bytes() == before
    assert "MMStar" in capsys.readouterr().out


def test_the_command_says_what_is_wrong(data, tmp_path, capsys):
    out = str(tmp_path / "run")
    model, where = ["--model", str(MODEL)], ["--data", str(data), "--out", out]
    for line, message in (
        ([], "give --out RUN"),
        (["--out", out], "give --model"),
        ([*model, *where], "give --bench"),
        ([*model, *where, "--bench", "mmstr"], "no benchmark 'mmstr'"),
        ([*model, *where, "--bench", "docvqa"], "nothing there for docvqa"),
        ([*model, *where, "--bench", "mmstar", "--limit", "0"], "--limit 0: use 1 or more"),
        ([*model, *where, "--bench", "mmstar", "max_tokens=3"], "did you mean"),
        ([*model, *where, "--bench", "mmstar", "temperature=-1"], "temperature is -1"),
        (["--model", "nowhere", *where, "--bench", "mmstar"], "nowhere"),
        (["--out", out, "--score-only"], "no predictions there"),
    ):
        assert infer.main(["eval", *line]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert infer.main(["eval", "--list"]) == 0
    assert "MMBench_DEV_EN" in capsys.readouterr().out
