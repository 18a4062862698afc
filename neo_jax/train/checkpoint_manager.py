"""Checkpoints of a run: parameters, optimizer, data iterator, counts. Written in the background.

WORKDIR/checkpoints/STEP/
  params/     all parameters, for inference and export: their average if one is kept; with LoRA
              only the factors
  optimizer/  moments and the step; if an average is kept, also the trainable parameters
  data/       the state of each host's data iterator
  counts/     numbers of records so far: all, bad, too long
"""

from collections.abc import Mapping
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from neo_jax.errors import InputError
from neo_jax.train import param_paths
from neo_jax.train.step import State

# The key of the trainable parameters in `optimizer/`. Runs have it on disk: do not rename it.
_TRAINABLE_ON_DISK = "trained"


class Checkpoints:
    """Saves and restores a run's state. A context manager: its end waits for unfinished writes.

    Args:
      keep: how many of the newest are kept.
      keep_every: checkpoints of steps divisible by it are kept for ever; 0: none.
      only_trainable: save no frozen parameters; they are those of the run's start.
    """

    def __init__(
        self, workdir: epath.Path, keep: int, keep_every: int, only_trainable: bool = False
    ):
        policies = [managers.LatestN(keep)]
        if keep_every:
            policies.append(managers.EveryNSteps(keep_every))
        self._only_trainable = only_trainable
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
        """The newest step whose checkpoint is complete; None if there is none."""
        return self._manager.latest_step()

    def save(self, state: State, data: grain.DatasetIterator, counts: Mapping[str, int]) -> None:
        """Saves under the state's step. Returns as soon as the state may be donated."""
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
        """The state and the counts of the newest checkpoint; sets `data` to its place.

        Args:
          state: gives shapes, types and shardings.

        Raises:
          InputError: naming the directory, if it does not fit this run or is damaged.
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
        except Exception as error:  # Orbax raises many kinds for damage
            where = self._manager.directory / str(step)
            raise InputError(f"{where}: cannot resume from it: {error}") from error
        saved, optimizer = found["params"], found["optimizer"]
        trainable, frozen = param_paths.split_params(
            saved, param_paths.all_paths(state["trainable"])
        )
        if self._only_trainable:
            frozen = state["frozen"]
        restored = {"frozen": frozen, "opt": optimizer["opt"], "step": optimizer["step"]}
        if "ema" in state:
            restored |= {"ema": trainable, "trainable": optimizer[_TRAINABLE_ON_DISK]}
        else:
            restored["trainable"] = trainable
        return restored, found["counts"]

    def _parts(self, state: State) -> tuple[dict, dict]:
        """The trees of `params/` and of `optimizer/`."""
        optimizer = {name: state[name] for name in ("opt", "step")}
        if "ema" in state:
            optimizer[_TRAINABLE_ON_DISK] = state["trainable"]
        params = state.get("ema", state["trainable"])
        if not self._only_trainable:
            params = param_paths.merge_params(params, state["frozen"])
        return params, optimizer


def _abstract(array: jax.Array) -> Any:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
