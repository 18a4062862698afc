"""One training step as a pure function: (state, batch) -> (state, metrics).

The state is a dict: `trained` (float32 masters) and `frozen` parameters, two trees that
`rules.merge` makes one; `opt`, the optimizer's; `step`, how many were made; and `ema`, if an
average of the trained parameters is kept. Only trained parameters have gradients and moments.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from neo_jax.batch import Batch
from neo_jax.config import ModelConfig
from neo_jax.train import rules
from neo_jax.train.loss import loss_of
from neo_jax.train.optimizer import OptimConfig, learning_rate, make_optimizer

State = dict
Metrics = dict[str, jax.Array]
Join = Callable[[dict, dict], dict]  # trained and frozen to the model's parameters


def new_state(o: OptimConfig, steps: int, trained: dict, frozen: dict) -> State:
    """The state before the first step. Run it under jit: it then makes everything in its place."""
    trained = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trained)
    state = {"trained": trained, "frozen": frozen, "step": jnp.zeros((), jnp.int32)}
    state["opt"] = make_optimizer(o, steps).init(trained)
    if o.ema:
        state["ema"] = jax.tree.map(jnp.copy, trained)
    return state


def make_step(
    c: ModelConfig, o: OptimConfig, steps: int, remat: str, join: Join = rules.merge
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The step, jitted; it takes over the state it is given.

    A batch has a leading axis of micro-batches [M, ...] whose gradients are summed; its weights
    are divided by their sum over all of them. Metrics are scalars: `loss`, `grad_norm` (before
    clipping) and `learning_rate`.
    """
    optimizer, rate = make_optimizer(o, steps), learning_rate(o, steps)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        trained, frozen = state["trained"], state["frozen"]
        weights = batch["weights"]
        batch = {**batch, "weights": weights / jnp.maximum(jnp.sum(weights), 1e-9)}

        def loss_fn(trained, micro_batch):
            return loss_of(c, join(trained, frozen), micro_batch, remat)

        loss, gradients = _summed(jax.value_and_grad(loss_fn), trained, batch)
        updates, opt = optimizer.update(gradients, state["opt"], trained)
        new = {**state, "trained": optax.apply_updates(trained, updates), "opt": opt}
        new["step"] = state["step"] + 1
        if o.ema:
            new["ema"] = jax.tree.map(
                lambda mean, value: o.ema * mean + (1 - o.ema) * value, state["ema"], new["trained"]
            )
        norm = optax.tree.norm(gradients)
        return new, {"loss": loss, "grad_norm": norm, "learning_rate": rate(state["step"])}

    return jax.jit(step, donate_argnums=0)


def make_evaluation(
    c: ModelConfig, join: Join = rules.merge
) -> Callable[[State, Batch], tuple[jax.Array, jax.Array]]:
    """Sums of weights * cross-entropy and of weights over a batch of one micro-batch, jitted."""

    def evaluate(state: State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        params = join(state.get("ema", state["trained"]), state["frozen"])
        batch = jax.tree.map(lambda array: array[0], dict(batch))
        return loss_of(c, params, batch), jnp.sum(batch["weights"])

    return jax.jit(evaluate)


def _summed(value_and_grad: Callable, trained: dict, batch: Batch) -> tuple[jax.Array, dict]:
    """Value and gradients summed over micro-batches, one after the other."""
    first = jax.tree.map(lambda array: array[0], dict(batch))
    if batch["tokens"].shape[0] == 1:
        return value_and_grad(trained, first)

    def add(sums, micro_batch):
        return jax.tree.map(jnp.add, sums, value_and_grad(trained, micro_batch)), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), trained))
    return jax.lax.scan(add, zeros, dict(batch))[0]
