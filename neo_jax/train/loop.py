"""The training loop: all the input and output around `step.py`, in a fixed order.

    save ──▶ next batch ──▶ step ──▶ log the previous step's metrics

The host runs one step ahead of the device: it reads a step's metrics only after it has dispatched
the next step. The same command resumes a run, which then takes the steps it would have taken.
"""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from neo_jax.batch import micro_batches
from neo_jax.data.mixture import Mixture
from neo_jax.data.pipeline import batches
from neo_jax.data.tokenizer import NeoTokenizer
from neo_jax.errors import InputError
from neo_jax.model import lora
from neo_jax.model_config import ModelConfig
from neo_jax.sharding import data_shard, describe
from neo_jax.train import param_paths
from neo_jax.train.bad_records import BadRecords
from neo_jax.train.checkpoint_manager import Checkpoints
from neo_jax.train.initialize import run_folder, run_mesh, starting_point, write_run
from neo_jax.train.profiler import Profiler
from neo_jax.train.progress import Progress
from neo_jax.train.run_metrics import Metrics
from neo_jax.train.step import State, first_state, make_evaluation, make_merge_params, make_step
from neo_jax.train.train_config import Config


@dataclasses.dataclass(frozen=True)
class Finished:
    """The result of a run."""

    config: ModelConfig
    tokenizer: NeoTokenizer
    mesh: jax.sharding.Mesh
    params: dict  # the average if one was kept; with LoRA, merged
    step: int
    is_stopped: bool  # by SIGTERM, before its last step; the same command resumes it


def train(c: Config, log: Callable[[str], None] = tqdm.tqdm.write) -> Finished:
    """Starts or resumes the run that `c` describes.

    Args:
      log: takes each line that the run prints; only the first process calls it.

    Raises:
      InputError: for wrong settings, files or records, and for a loss that is not finite.
    """
    if not c.workdir:
        raise InputError("workdir: name a folder for the run, workdir=runs/mine")
    if jax.process_index():
        log = _log_nothing
    workdir, mesh = run_folder(c.workdir), run_mesh(c.mesh)
    c.check_mesh(mesh)
    if c.attention == "pallas" and mesh.devices.flat[0].platform != "tpu":
        raise InputError("attention=pallas runs on TPUs: use auto, which takes what runs here")
    mixture = Mixture.parse(c.data.mixture)
    held_out = Mixture.parse(c.held_out) if c.held_out else None
    model, tokenizer, params = starting_point(c, mesh)
    paths = param_paths.matching(params, c.lora.targets if c.lora.rank else c.trainable)
    write_run(c, model, tokenizer, mixture.fingerprint(), paths)
    run = _Run(c, model, tokenizer, mesh, mixture, held_out, workdir, log)
    with jax.set_mesh(mesh), _Terminated() as terminated:
        make = jax.jit(first_state, static_argnums=(0, 1, 3), donate_argnums=2)
        state = make(c, model, params, tuple(paths))
        del params
        with Checkpoints(workdir, c.keep, c.keep_every, c.lora.rank > 0) as checkpoints:
            state, is_stopped = run.train(state, checkpoints, terminated)
        return Finished(model, tokenizer, mesh, run.params(state), int(state["step"]), is_stopped)


class _Run:
    """What stays the same through a run, and its loop."""

    def __init__(self, c: Config, model, tokenizer, mesh, mixture, held_out, workdir, log):
        self.c, self.model, self.tokenizer, self.mesh = c, model, tokenizer, mesh
        self.mixture, self.held_out, self.workdir, self.log = mixture, held_out, workdir, log
        self.shard = data_shard(mesh)
        self.records = BadRecords(c.data, mixture, tokenizer, workdir, log)
        self.profiler = Profiler(c.profile, workdir / "profile", log)
        self.merge_params = make_merge_params(c)
        self.evaluation = make_evaluation(model, self.merge_params, c.attention)

    def params(self, state: State) -> dict:
        """The model's parameters, from the average if one is kept."""
        trainable = state.get("ema", state["trainable"])
        if self.c.lora.rank:
            return jax.jit(lora.merge_lora, static_argnums=2)(
                trainable, state["frozen"], self.c.lora.scale
            )
        return param_paths.merge_params(trainable, state["frozen"])

    def train(self, state: State, checkpoints: Checkpoints, terminated) -> tuple[State, bool]:
        c = self.c
        data = iter(self._batches(self.mixture, c.seed, repeat=True))
        if checkpoints.latest is not None:
            state, counts = checkpoints.restore(state, data)
            self.records.counts.update(counts)
            self.log(f"going on from step {checkpoints.latest} of {self.workdir}")
        first = int(state["step"])
        step_fn = make_step(self.model, c.optim, c.steps, c.remat, self.merge_params, c.attention)
        self._describe(state)
        with (
            Metrics(self.workdir, first) as metrics,
            tqdm.tqdm(total=c.steps, initial=first, unit="step", disable=None) as bar,
        ):
            counts = self.records.counts
            progress = Progress(
                c, self.model, self.mesh, self.mixture, counts, metrics, bar, self.log
            )
            for step in range(first, c.steps):
                stops = terminated(step)
                if stops or (step > first and step % c.save_every == 0):
                    progress.flush(step)  # so that no state of a loss that is not finite is saved
                    with progress.paused():
                        checkpoints.save(state, data, counts)
                if stops:
                    self.log(f"asked to stop: saved step {step}; start it again to go on")
                    return state, True
                self.profiler.before_step(step)
                waited = time.perf_counter()
                batch = next(data)
                waited = time.perf_counter() - waited
                self.records.count(batch)
                placed = micro_batches(batch, c.micro_batches, self.mesh)
                with progress.paused() if step == first else contextlib.nullcontext():  # compiles
                    state, numbers = step_fn(state, placed)
                progress.flush(step)
                progress.enqueue(step, numbers, batch, waited)
                if c.eval_every and (step + 1) % c.eval_every == 0:
                    progress.flush(step + 1)
                    with progress.paused():
                        self._evaluate(state, metrics, step + 1)
            progress.flush(c.steps)
            self.profiler.stop()
            checkpoints.save(state, data, counts)
            if first < c.steps and not (c.eval_every and c.steps % c.eval_every == 0):
                self._evaluate(state, metrics, c.steps)
        return state, False

    def _batches(self, mixture: Mixture, seed: int, repeat: bool):
        return batches(
            self.c.data, mixture, self.tokenizer, seed=seed, shard=self.shard, repeat=repeat
        )

    def _describe(self, state: State) -> None:
        sizes = [
            sum(leaf.size for leaf in jax.tree.leaves(state[which]))
            for which in ("trainable", "frozen")
        ]
        self.log(
            f"{sizes[0] / 1e6:.2f} M parameters are trainable, {sizes[1] / 1e6:.2f} M frozen; "
            f"{len(self.mixture):,} records; mesh {describe(self.mesh)} of "
            f"{jax.devices()[0].device_kind}"
        )

    def _evaluate(self, state: State, metrics: Metrics, step: int) -> None:
        """Logs the loss on the first held-out batches, the same ones each time."""
        if self.held_out is None:
            return
        data = iter(self._batches(self.held_out, seed=0, repeat=True))
        sums = np.zeros(2)
        for _ in range(self.c.eval_batches):
            batch = micro_batches(next(data), 1, self.mesh)
            sums += [float(part) for part in self.evaluation(state, batch)]
        loss = float(sums[0] / max(sums[1], 1e-9))
        metrics.write(step, {"held_out_loss": loss})
        self.log(f"step {step}: held-out loss {loss:.4f}")


class _Terminated:
    """Whether SIGTERM came, on any host: clouds send it before they preempt a machine.

    With several processes JAX's preemption service handles the signal in each of them, and they
    agree on a step to stop at; its handler must stay.
    """

    def __init__(self):
        self._has_signal = False

    def __enter__(self) -> "_Terminated":
        if jax.process_count() == 1:
            self._previous_handler = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *error) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def _handle(self, *_) -> None:
        self._has_signal = True

    def __call__(self, step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._has_signal


def _log_nothing(message: str) -> None:
    """The `log` of all processes but the first."""
