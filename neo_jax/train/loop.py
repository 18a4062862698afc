"""The training loop: all the input and output around `step.py`. Its order is fixed.

    save ──▶ next batch ──▶ step ──▶ say what the step before has given

The host is always one step ahead: it looks at a step's numbers only after the next was ordered.
A run is resumed by starting it again; what follows is what would have followed.
"""

import contextlib
import dataclasses
import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping

import jax
import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils

from neo_jax.batch import micro_batches
from neo_jax.data.mixture import Mixture
from neo_jax.data.pipeline import TOO_LONG, batches, explain
from neo_jax.data.tokenizer import NeoTokenizer
from neo_jax.errors import InputError
from neo_jax.model import lora
from neo_jax.model_config import ModelConfig
from neo_jax.sharding import data_shard, describe
from neo_jax.train import trainable
from neo_jax.train.checkpoint_manager import Checkpoints
from neo_jax.train.initialize import run_folder, run_mesh, starting_point, write_run
from neo_jax.train.metrics import Metrics, append_line
from neo_jax.train.progress import Progress
from neo_jax.train.step import State, first_state, join_of, make_evaluation, make_step
from neo_jax.train.train_config import Config

MOST_EXPLAINED = 1000  # records that could not be used, of which the reason is written down
LEAST_SEEN = 100  # records before their bad share is looked at


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run that ended."""

    config: ModelConfig
    tokenizer: NeoTokenizer
    mesh: jax.sharding.Mesh
    params: dict  # the average if one was kept
    step: int
    is_stopped: bool  # by SIGTERM, before its last step; start it again to go on


def train(c: Config, log: Callable[[str], None] = tqdm.tqdm.write) -> Finished:
    """Runs, or goes on with, the training that `c` describes.

    Raises:
      InputError: for settings, files or records that are wrong, and for a loss that is not finite.
    """
    if not c.workdir:
        raise InputError("workdir: name a folder for the run, workdir=runs/mine")
    if jax.process_index():  # one voice is enough
        log = _log_nothing
    workdir, mesh = run_folder(c.workdir), run_mesh(c.mesh)
    c.check_mesh(mesh)
    if c.attention == "pallas" and mesh.devices.flat[0].platform != "tpu":
        raise InputError("attention=pallas runs on TPUs: use auto, which takes what runs here")
    mixture = Mixture.parse(c.data.mixture)
    held_out = Mixture.parse(c.held_out) if c.held_out else None
    model, tokenizer, params = starting_point(c, mesh)
    paths = trainable.matching(params, c.lora.targets if c.lora.rank else c.trained)
    write_run(c, model, tokenizer, mixture.fingerprint(), paths)
    run = _Run(c, model, tokenizer, mesh, mixture, held_out, workdir, log)
    with jax.set_mesh(mesh), _Terminated() as terminated:
        make = jax.jit(first_state, static_argnums=(0, 1, 3), donate_argnums=2)
        state = make(c, model, params, tuple(paths))
        del params
        with Checkpoints(workdir, c.keep, c.keep_every, c.lora.rank > 0) as checkpoints:
            state, is_stopped = run.go(state, checkpoints, terminated)
        return Finished(model, tokenizer, mesh, run.params(state), int(state["step"]), is_stopped)


class _Run:
    """What stays the same through a run."""

    def __init__(self, c: Config, model, tokenizer, mesh, mixture, held_out, workdir, log):
        self.c, self.model, self.tokenizer, self.mesh = c, model, tokenizer, mesh
        self.mixture, self.held_out, self.workdir, self.log = mixture, held_out, workdir, log
        self.shard = data_shard(mesh)
        self.counts: Counter = Counter()
        self.join = join_of(c)
        self.evaluation = make_evaluation(model, self.join, c.attention)
        self._is_tracing = False

    def params(self, state: State) -> dict:
        """The model's parameters as trained: the average, if one is kept."""
        trained = state.get("ema", state["trained"])
        if self.c.lora.rank:
            return jax.jit(lora.merge_lora, static_argnums=2)(
                trained, state["frozen"], self.c.lora.scale
            )
        return trainable.merge(trained, state["frozen"])

    def go(self, state: State, checkpoints: Checkpoints, terminated) -> tuple[State, bool]:
        c = self.c
        data = iter(self._batches(self.mixture, c.seed, repeat=True))
        if checkpoints.latest is not None:
            state, counts = checkpoints.restore(state, data)
            self.counts.update(counts)
            self.log(f"going on from step {checkpoints.latest} of {self.workdir}")
        first = int(state["step"])
        step_fn = make_step(self.model, c.optim, c.steps, c.remat, self.join, c.attention)
        self._describe(state)
        with (
            Metrics(self.workdir, first) as metrics,
            tqdm.tqdm(total=c.steps, initial=first, unit="step", disable=None) as bar,
        ):
            progress = Progress(
                c, self.model, self.mesh, self.mixture, self.counts, metrics, bar, self.log
            )
            for step in range(first, c.steps):
                stops = terminated(step)
                if stops or (step > first and step % c.save_every == 0):
                    progress.check(step)  # so that nothing that is not finite is ever saved
                    with progress.paused():
                        checkpoints.save(state, data, self.counts)
                if stops:
                    self.log(f"asked to stop: saved step {step}; start it again to go on")
                    return state, True
                self._profile(step)
                waited = time.perf_counter()
                batch = next(data)
                waited = time.perf_counter() - waited
                self._count(batch)
                placed = micro_batches(batch, c.micro_batches, self.mesh)
                with progress.paused() if step == first else contextlib.nullcontext():  # compiles
                    state, numbers = step_fn(state, placed)
                progress.check(step)
                progress.report_later(step, numbers, batch, waited)
                if c.eval_every and (step + 1) % c.eval_every == 0:
                    progress.check(step + 1)
                    with progress.paused():
                        self._evaluate(state, metrics, step + 1)
            progress.check(c.steps)
            self._profile(c.steps)
            checkpoints.save(state, data, self.counts)
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
            for which in ("trained", "frozen")
        ]
        self.log(
            f"{sizes[0] / 1e6:.2f} M parameters are trained, {sizes[1] / 1e6:.2f} M are frozen; "
            f"{len(self.mixture):,} records; mesh {describe(self.mesh)} of "
            f"{jax.devices()[0].device_kind}"
        )

    def _count(self, batch: Mapping[str, np.ndarray]) -> None:
        """Counts records; writes down those that cannot be used; ends a run with too many."""
        skipped = batch["skipped"][batch["skipped"][..., 0] > 0]
        self.counts["records"] += int((batch["records"] > 0).sum()) + len(skipped)
        for number, reason in skipped:
            self.counts["too long" if reason == TOO_LONG else "bad"] += 1
            if self.counts["too long"] + self.counts["bad"] <= MOST_EXPLAINED:
                self._write_down(int(number) - 1, reason)
        bad, seen = self.counts["bad"], self.counts["records"]
        if seen >= LEAST_SEEN and bad > self.c.data.max_bad_share * seen:
            raise InputError(
                f"{bad} of {seen} records cannot be used, more than data.max_bad_share="
                f"{self.c.data.max_bad_share} allows; the reasons are in {self._bad_file}"
            )

    @property
    def _bad_file(self) -> epath.Path:
        return self.workdir / f"bad_records_{jax.process_index()}.jsonl"

    def _write_down(self, number: int, reason: int) -> None:
        why = explain(self.mixture, self.tokenizer, self.c.data.limits(), number)
        if reason != TOO_LONG:
            self.log(f"left out: {why}")
        kind = "too long" if reason == TOO_LONG else "bad"
        append_line(self._bad_file, json.dumps({"kind": kind, "why": why}))

    def _evaluate(self, state: State, metrics: Metrics, step: int) -> None:
        """The loss on the first batches of what is held out: each time the same."""
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

    def _profile(self, step: int) -> None:
        first, last = self.c.profile
        if last and first <= step <= last and not self._is_tracing and step < self.c.steps:
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self._is_tracing = True
        elif self._is_tracing and (step > last or step == self.c.steps):
            jax.profiler.stop_trace()
            self._is_tracing = False
            self.log(f"steps {first} to {last} are traced in {self.workdir / 'profile'}")


class _Terminated:
    """Whether SIGTERM came, on any host: clouds send it before they take a machine away.

    Of several processes each has the handler of JAX's own service, through which they agree on a
    step to stop at; it must stay.
    """

    def __init__(self):
        self._is_asked = False

    def __enter__(self) -> "_Terminated":
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *error) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_) -> None:
        self._is_asked = True

    def __call__(self, step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._is_asked


def _log_nothing(message: str) -> None:
    """Takes the place of `log`."""
