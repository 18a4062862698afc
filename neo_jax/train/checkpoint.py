"""Checkpoints of a run: parameters, optimizer, data iterator, counts. Written in the background.

WORKDIR/checkpoints/STEP/
  params/     all parameters, as `infer.py` and `convert.to_hf` read them; with LoRA its factors
  optimizer/  moments, the average if one is kept, and the step
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
from neo_jax.train import rules
from neo_jax.train.step import State

_OPTIMIZER = ("opt", "step", "ema")


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
        save = ocp.args.StandardSave
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=save(self._params(state)),
                optimizer=save({name: state[name] for name in _OPTIMIZER if name in state}),
                data=grain.checkpoint.CheckpointSave(data),
                counts=ocp.args.JsonSave(dict(counts)),
            ),
        )

    def restore(self, state: State, data: grain.DatasetIterator) -> tuple[State, dict[str, int]]:
        """The latest state, shaped and placed like `state`, whose arrays it replaces; the counts.

        Raises:
          InputError: naming the directory, when it does not fit this run or is damaged.
        """
        optimizer = {name: state[name] for name in _OPTIMIZER if name in state}
        target = jax.tree.map(_abstract, {"params": self._params(state), "optimizer": optimizer})
        step = self.latest
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(target["params"]),
                    optimizer=ocp.args.StandardRestore(target["optimizer"]),
                    data=grain.checkpoint.CheckpointRestore(data),
                    counts=ocp.args.JsonRestore(),
                ),
            )
        except Exception as error:  # what Orbax raises for damage is of many kinds
            where = self._manager.directory / str(step)
            raise InputError(f"{where}: cannot resume from it: {error}") from error
        trained, frozen = rules.split(found["params"], rules.paths(state["trained"]))
        if self._only_trained:
            frozen = state["frozen"]
        return {"trained": trained, "frozen": frozen, **found["optimizer"]}, found["counts"]

    def _params(self, state: State) -> dict:
        if self._only_trained:
            return state["trained"]
        return rules.merge(state["trained"], state["frozen"])


def _abstract(array: jax.Array) -> Any:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
