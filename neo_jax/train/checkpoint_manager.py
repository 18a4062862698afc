"""Checkpoints of a run: parameters, optimizer, data iterator, counts. Written in the background.

WORKDIR/checkpoints/STEP/
  params/     all parameters, as `infer.py` and `convert.to_hf` read them: the average where one is
              kept; with LoRA its factors
  optimizer/  moments, the step, and the trained parameters themselves where an average is kept
  data/       where each host's iterator stands
  counts/     of records so far
"""

from collections.abc import Mapping
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from neo_jax.errors import InputError
from neo_jax.train import trainable
from neo_jax.train.step import State


class Checkpoints:
    """What a run has saved; a context manager that waits for what is being written.

    Args:
      keep: the newest that are kept.
      keep_every: steps; those divisible by it are kept for ever; 0 is none.
      only_trained: save no frozen parameters; they are those of the run's start.
    """

    def __init__(self, workdir: epath.Path, keep: int, keep_every: int, only_trained: bool = False):
        policies = [managers.LatestN(keep)]
        if keep_every:
            policies.append(managers.EveryNSteps(keep_every))
        self._only_trained = only_trained
        self._manager = ocp.CheckpointManager(
            workdir / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                preservation_policy=managers.AnyPreservationPolicy(policies),
                save_decision_policy=managers.FixedIntervalPolicy(1),
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The last step that was saved whole."""
        return self._manager.latest_step()

    def save(self, state: State, data: grain.DatasetIterator, counts: Mapping[str, int]) -> None:
        """Saves under the state's step; returns as soon as the state may change."""
        step = int(state["step"])
        if step == self.latest:
            return
        save, (params, optimizer) = ocp.args.StandardSave, self._parts(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=save(params),
                optimizer=save(optimizer),
                data=grain.checkpoint.CheckpointSave(data),
                counts=ocp.args.JsonSave(dict(counts)),
            ),
        )

    def restore(self, state: State, data: grain.DatasetIterator) -> tuple[State, dict[str, int]]:
        """The latest state, shaped and placed like `state`, whose arrays it replaces; the counts.

        Raises:
          InputError: naming the directory, when it does not fit this run or is damaged.
        """
        params, optimizer = jax.tree.map(_abstract, self._parts(state))
        step = self.latest
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(params),
                    optimizer=ocp.args.StandardRestore(optimizer),
                    data=grain.checkpoint.CheckpointRestore(data),
                    counts=ocp.args.JsonRestore(),
                ),
            )
        except Exception as error:  # what Orbax raises for damage is of many kinds
            where = self._manager.directory / str(step)
            raise InputError(f"{where}: cannot resume from it: {error}") from error
        shown, frozen = trainable.split(found["params"], trainable.paths(state["trained"]))
        if self._only_trained:
            frozen = state["frozen"]
        name = "ema" if "ema" in state else "trained"
        return {name: shown, "frozen": frozen, **found["optimizer"]}, found["counts"]

    def _parts(self, state: State) -> tuple[dict, dict]:
        """What others read, and what only the run needs."""
        optimizer = {name: state[name] for name in ("opt", "step")}
        if "ema" in state:
            optimizer["trained"] = state["trained"]
        params = state.get("ema", state["trained"])
        return params if self._only_trained else trainable.merge(params, state["frozen"]), optimizer


def _abstract(array: jax.Array) -> Any:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
