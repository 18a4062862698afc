"""One training step as a pure function: (state, batch) -> (state, metrics).

The state is a dict:

    trainable  parameters with gradients and moments, in float32
    frozen     all other parameters, in the type of the products
    opt        the optimizer's state
    step       the number of steps made
    ema        the average of the trainable parameters, if one is kept

`merge_params` makes the model's parameters of `trainable` and `frozen`.
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
from neo_jax.train import param_paths
from neo_jax.train.loss import loss_of
from neo_jax.train.optimizer import OptimConfig, learning_rate, make_optimizer
from neo_jax.train.train_config import Config

State = dict
Metrics = dict[str, jax.Array]
MergeParams = Callable[[dict, dict], dict]  # (trainable, frozen) -> the model's parameters


def make_merge_params(c: Config) -> MergeParams:
    """Returns the function that merges trainable and frozen parameters.

    With LoRA the trainable ones are factors, and all parameters of the model are frozen.
    """
    if c.lora.rank:
        return functools.partial(lora.with_lora, scale=c.lora.scale)
    return param_paths.merge_params


def first_state(c: Config, model: ModelConfig, params: dict, paths: Sequence[str]) -> State:
    """The state a run starts with. Call it under jit, as `new_state`.

    Args:
      paths: of the trainable parameters, or with LoRA of the matrices that get factors.
    """
    if c.lora.rank:
        key = jax.random.key(c.seed)
        trainable, frozen = lora.new_factors(params, paths, c.lora.rank, key), params
    else:
        trainable, frozen = param_paths.split_params(params, paths)
    frozen = jax.tree.map(lambda leaf: leaf.astype(model.dtype), frozen)
    return new_state(c.optim, c.steps, trainable, frozen)


def new_state(o: OptimConfig, steps: int, trainable: dict, frozen: dict) -> State:
    """The state before the first step. Call it under jit: arrays are then created sharded."""
    trainable = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trainable)
    state = {"trainable": trainable, "frozen": frozen, "step": jnp.zeros((), jnp.int32)}
    state["opt"] = make_optimizer(o, steps).init(trainable)
    if o.ema:
        state["ema"] = jax.tree.map(jnp.copy, trainable)
    return state


def make_step(
    c: ModelConfig,
    o: OptimConfig,
    steps: int,
    remat: str,
    merge_params: MergeParams = param_paths.merge_params,
    attention: str = "auto",
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The jitted train step. It donates the state: use only the one it returns.

    A batch has a leading axis of micro-batches [M, ...], whose gradients are summed. Its weights
    are divided by their sum over all micro-batches. Metrics are scalars: `loss`, `grad_norm`
    (before clipping) and `learning_rate`.
    """
    optimizer, rate = make_optimizer(o, steps), learning_rate(o, steps)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        trainable, weights = state["trainable"], batch["weights"]
        batch = {**batch, "weights": weights / jnp.maximum(jnp.sum(weights), 1e-9)}
        loss, gradients = loss_and_gradients(
            c, trainable, state["frozen"], batch, merge_params, remat, attention
        )
        updates, opt = optimizer.update(gradients, state["opt"], trainable)
        new = {**state, "trainable": optax.apply_updates(trainable, updates), "opt": opt}
        new["step"] = state["step"] + 1
        if o.ema:
            new["ema"] = jax.tree.map(
                lambda mean, value: o.ema * mean + (1 - o.ema) * value,
                state["ema"],
                new["trainable"],
            )
        norm = optax.tree.norm(gradients)
        return new, {"loss": loss, "grad_norm": norm, "learning_rate": rate(state["step"])}

    return jax.jit(step, donate_argnums=0)


def make_evaluation(
    c: ModelConfig, merge_params: MergeParams = param_paths.merge_params, attention: str = "auto"
) -> Callable[[State, Batch], tuple[jax.Array, jax.Array]]:
    """A jitted function from (state, batch of one micro-batch) to two scalars.

    They are the sum of weights * cross-entropy, and the sum of weights.
    """

    def evaluate(state: State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        def local(trainable, frozen, batch):
            loss = loss_of(c, merge_params(trainable, frozen), _first(batch), "none", attention)
            return psum_replicated(loss, P())

        trees = (state.get("ema", state["trainable"]), state["frozen"])
        in_specs = (*map(_partitions, trees), PARTITIONS)
        loss = shard_map_over_data(local, in_specs, P())(*trees, dict(batch))
        return loss, jnp.sum(batch["weights"])

    return jax.jit(evaluate)


def loss_and_gradients(
    c: ModelConfig,
    trainable: dict,
    frozen: dict,
    batch: Batch,
    merge_params: MergeParams = param_paths.merge_params,
    remat: str = "none",
    attention: str = "auto",
) -> tuple[jax.Array, dict]:
    """The loss of a batch of micro-batches [M, B, ...], and its gradients by `trainable`.

    Call it under a mesh, inside jit; `remat` and `attention` as in `Neo.features`.
    """
    partitions = _partitions(trainable)

    def local(trainable, frozen, batch):
        def loss_fn(trainable, micro_batch):
            return loss_of(c, merge_params(trainable, frozen), micro_batch, remat, attention)

        loss, gradients = _over_micro_batches(jax.value_and_grad(loss_fn), trainable, batch)
        return psum_replicated(loss, P()), jax.tree.map(psum_replicated, gradients, partitions)

    in_specs = (partitions, _partitions(frozen), PARTITIONS)
    run = shard_map_over_data(local, in_specs, (P(), partitions))
    return run(trainable, frozen, dict(batch))


def _partitions(tree: dict) -> dict:
    return jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, tree)


def _first(batch: Batch) -> Batch:
    return jax.tree.map(lambda array: array[0], dict(batch))


def _over_micro_batches(value_and_grad: Callable, trainable: dict, batch: Batch):
    """Value and gradients, summed over micro-batches that run one after the other."""
    if batch["tokens"].shape[0] == 1:
        return value_and_grad(trainable, _first(batch))

    def add(sums, micro_batch):
        return jax.tree.map(jnp.add, sums, value_and_grad(trainable, micro_batch)), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), trainable))
    return jax.lax.scan(add, zeros, dict(batch))[0]
