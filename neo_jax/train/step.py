"""One training step as a pure function: (state, batch) -> (state, metrics).

The state is a dict: `trained` (float32 masters) and `frozen` parameters, two trees that
`rules.merge` makes one; `opt`, the optimizer's; `step`, how many were made; and `ema`, if an
average of the trained parameters is kept. Only trained parameters have gradients and moments.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from neo_jax.batch import PARTITIONS, Batch
from neo_jax.collectives import psum_replicated, shard_map_over_data
from neo_jax.model import lora
from neo_jax.model_config import ModelConfig
from neo_jax.train import trainable
from neo_jax.train.loss import loss_of
from neo_jax.train.optimizer import OptimConfig, learning_rate, make_optimizer
from neo_jax.train.train_config import Config

State = dict
Metrics = dict[str, jax.Array]
Join = Callable[[dict, dict], dict]  # trained and frozen to the model's parameters


def join_of(c: Config) -> Join:
    """What makes one tree of a run's parameters: of two trees of them, or of LoRA's factors."""
    if c.lora.rank:
        return functools.partial(lora.with_lora, scale=c.lora.scale)
    return trainable.merge


def first_state(c: Config, model: ModelConfig, params: dict, paths: Sequence[str]) -> State:
    """The state a run starts with; run it under jit, as `new_state`.

    Args:
      paths: of the parameters that are trained, or with LoRA get factors that are.
    """
    if c.lora.rank:
        key = jax.random.key(c.seed)
        trained, frozen = lora.new_factors(params, paths, c.lora.rank, key), params
    else:
        trained, frozen = trainable.split(params, paths)
    frozen = jax.tree.map(lambda leaf: leaf.astype(model.dtype), frozen)
    return new_state(c.optim, c.steps, trained, frozen)


def new_state(o: OptimConfig, steps: int, trained: dict, frozen: dict) -> State:
    """The state before the first step. Run it under jit: it then makes everything in its place."""
    trained = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trained)
    state = {"trained": trained, "frozen": frozen, "step": jnp.zeros((), jnp.int32)}
    state["opt"] = make_optimizer(o, steps).init(trained)
    if o.ema:
        state["ema"] = jax.tree.map(jnp.copy, trained)
    return state


def make_step(
    c: ModelConfig,
    o: OptimConfig,
    steps: int,
    remat: str,
    join: Join = trainable.merge,
    attention: str = "auto",
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The step, jitted; it takes over the state it is given.

    A batch has a leading axis of micro-batches [M, ...] whose gradients are summed; its weights
    are divided by their sum over all of them. Metrics are scalars: `loss`, `grad_norm` (before
    clipping) and `learning_rate`.
    """
    optimizer, rate = make_optimizer(o, steps), learning_rate(o, steps)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        trained, weights = state["trained"], batch["weights"]
        batch = {**batch, "weights": weights / jnp.maximum(jnp.sum(weights), 1e-9)}
        loss, gradients = loss_and_gradients(
            c, trained, state["frozen"], batch, join, remat, attention
        )
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
    c: ModelConfig, join: Join = trainable.merge, attention: str = "auto"
) -> Callable[[State, Batch], tuple[jax.Array, jax.Array]]:
    """Sums of weights * cross-entropy and of weights over a batch of one micro-batch, jitted."""

    def evaluate(state: State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        def local(trained, frozen, batch):
            loss = loss_of(c, join(trained, frozen), _first(batch), "none", attention)
            return psum_replicated(loss, P())

        trees = (state.get("ema", state["trained"]), state["frozen"])
        in_specs = (*map(_partitions, trees), PARTITIONS)
        loss = shard_map_over_data(local, in_specs, P())(*trees, dict(batch))
        return loss, jnp.sum(batch["weights"])

    return jax.jit(evaluate)


def loss_and_gradients(
    c: ModelConfig,
    trained: dict,
    frozen: dict,
    batch: Batch,
    join: Join = trainable.merge,
    remat: str = "none",
    attention: str = "auto",
) -> tuple[jax.Array, dict]:
    """The loss of a batch of micro-batches [M, B, ...], and its gradients for `trained`.

    Runs under a mesh, inside jit; `remat` and `attention` as in `Neo.features`.
    """
    partitions = _partitions(trained)

    def local(trained, frozen, batch):
        def loss_fn(trained, micro_batch):
            return loss_of(c, join(trained, frozen), micro_batch, remat, attention)

        loss, gradients = _over_micro_batches(jax.value_and_grad(loss_fn), trained, batch)
        return psum_replicated(loss, P()), jax.tree.map(psum_replicated, gradients, partitions)

    in_specs = (partitions, _partitions(frozen), PARTITIONS)
    run = shard_map_over_data(local, in_specs, (P(), partitions))
    return run(trained, frozen, dict(batch))


def _partitions(tree: dict) -> dict:
    return jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, tree)


def _first(batch: Batch) -> Batch:
    return jax.tree.map(lambda array: array[0], dict(batch))


def _over_micro_batches(value_and_grad: Callable, trained: dict, batch: Batch):
    """Value and gradients summed over micro-batches, one after the other."""
    if batch["tokens"].shape[0] == 1:
        return value_and_grad(trained, _first(batch))

    def add(sums, micro_batch):
        return jax.tree.map(jnp.add, sums, value_and_grad(trained, micro_batch)), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), trained))
    return jax.lax.scan(add, zeros, dict(batch))[0]
