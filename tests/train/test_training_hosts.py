"""A run of several processes, like the hosts of a pod."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import neo_jax
from helpers.golden import ROOT, load_case
from helpers.tolerance import assert_close
from helpers.training import CONFIG, losses
from neo_jax.batch import micro_batches
from neo_jax.data.mixture import Mixture
from neo_jax.data.pipeline import batches
from neo_jax.train import param_paths
from neo_jax.train.step import make_step, new_state

POD = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_compilation_cache_dir", {cache!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
import dataclasses
def get_config():
    from helpers.training import CONFIG
    jax.config.update("jax_num_cpu_devices", 4)
    return dataclasses.replace(CONFIG, mesh=(2, 2, 2), steps=4, keep=1)
"""


def two_hosts(script, workdir):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    line = [sys.executable, str(ROOT / "train.py"), str(script), f"workdir={workdir}"]
    settings = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [
        subprocess.Popen(line, env=os.environ | settings | {"JAX_PROCESS_ID": str(number)})
        for number in range(2)
    ]


@pytest.mark.slow
def test_two_hosts_train_as_one(tmp_path):
    """Each host feeds half of the rows; a single process with all rows gets the same losses.

    One host gets SIGTERM: both save the same step, and resume from it.
    """
    script, workdir = tmp_path / "config.py", tmp_path / "run"
    pod = POD.format(root=str(ROOT), tests=str(ROOT / "tests"), cache=str(tmp_path / "programs"))
    script.write_text(pod)
    hosts = two_hosts(script, workdir)
    while not (workdir / "metrics.jsonl").exists() and hosts[0].poll() is None:
        time.sleep(0.01)  # it now compiles the first step
    hosts[1].send_signal(signal.SIGTERM)
    assert [host.wait(timeout=400) for host in hosts] == [143, 143]
    assert 0 < len(losses(workdir)) < 4
    assert [host.wait(timeout=400) for host in two_hosts(script, workdir)] == [0, 0]
    neo = load_case("packed_train", (2, 2, 2))
    halves = [
        iter(
            batches(
                CONFIG.data, Mixture.parse(CONFIG.data.mixture), neo.tokenizer, seed=0, shard=shard
            )
        )
        for shard in ((0, 2), (1, 2))
    ]
    with jax.set_mesh(neo.mesh):
        paths = param_paths.matching(neo.params, (".*",))
        start = jax.jit(lambda p: new_state(CONFIG.optim, 4, *param_paths.split_params(p, paths)))
        state, found = start(neo.params), {}
        step = make_step(neo.config, CONFIG.optim, 4, "none")
        for number in range(1, 5):
            parts = [next(half) for half in halves]
            whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            state, metrics = step(state, micro_batches(whole, 1, neo.mesh))
            found[number] = float(metrics["loss"])
    assert losses(workdir) == pytest.approx(found, rel=1e-5)
    saved = neo_jax.load(workdir, dtype="float32", mesh=(1, 1, 1)).params
    assert_close(saved, state["ema"], 6e-4)
