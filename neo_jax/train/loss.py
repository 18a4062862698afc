"""The training loss: weighted next-token cross-entropy, computed for a chunk of tokens at a time.

[B, L, V] logits in float32 never exist. While the logits of a chunk are there, the gradients of the
loss by its features and by the head are computed as well. So the head's product runs three times,
not four as with rematerialisation. The head's gradient is summed over all chunks in float32.
Devices exchange it once, in the type of the features.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from neo_jax.batch import Batch
from neo_jax.collectives import all_gather_fsdp, reduce_scatter
from neo_jax.model.neo import bind
from neo_jax.model_config import ModelConfig
from neo_jax.sharding import AXES, partition_spec, spec

CHUNK = 1024  # tokens whose logits exist at once, on each device


def loss_of(
    c: ModelConfig, params: dict, batch: Batch, remat: str = "none", attention: str = "auto"
) -> jax.Array:
    """sum(weights * cross-entropy) of a device's part of a batch (`batch.py`): a scalar.

    For `shard_map_over_data`. Summed over all devices it is a mean if the weights of the batch, or
    of all micro-batches together, sum to 1. `remat` and `attention` as in `Neo.features`.
    """
    neo = bind(c, params)
    y_btd = neo.features(batch, remat, attention)
    with jax.named_scope("loss"):
        return cross_entropy(y_btd, neo.head_vd[...], batch["targets"], batch["weights"])


@jax.custom_vjp
def cross_entropy(
    y_btd: jax.Array, head_vd: jax.Array, targets_bt: jax.Array, weights_bt: jax.Array
) -> jax.Array:
    """sum over b, t of weights * (logsumexp(logits) - logits[targets]), logits = y @ head.T.

    Args, on each device:
      y_btd: [B, T, D] features; products run in their type.
      head_vd: [V, D] the device's part of the parameter.
      targets_bt: [B, T] int, below V.
      weights_bt: [B, T] float32.

    Differentiable in `y_btd` and `head_vd`.
    """
    return _run(y_btd, head_vd, targets_bt, weights_bt, with_gradients=False)


def _forward(y_btd, head_vd, targets_bt, weights_bt):
    loss, dy_btd, dhead_vd = _run(y_btd, head_vd, targets_bt, weights_bt, with_gradients=True)
    return loss, (dy_btd, dhead_vd.astype(head_vd.dtype))


def _backward(gradients, d_loss):
    dy_btd, dhead_vd = gradients
    return (dy_btd * d_loss).astype(dy_btd.dtype), dhead_vd * d_loss, None, None


cross_entropy.defvjp(_forward, _backward)


def _run(y_btd, head_vd, targets_bt, weights_bt, *, with_gradients: bool):
    """The loss; with gradients, also those by `y_btd` and by the device's part of `head_vd`."""
    local, vocab = functools.partial(_on_device, with_gradients=with_gradients), spec("vocab", None)
    run = jax.shard_map(
        local,
        in_specs=(P(), vocab, P(), P()),
        out_specs=(P(), P(), vocab) if with_gradients else P(),
        check_vma=False,
    )
    whole_vd = all_gather_fsdp(head_vd.astype(y_btd.dtype), partition_spec("vocab", "embed"))
    return run(y_btd, whole_vd, targets_bt, weights_bt)


def _on_device(y_btd, head_vd, targets_bt, weights_bt, *, with_gradients: bool):
    """A device's rows against its part of the vocabulary."""
    num_tokens, d = targets_bt.size, head_vd.shape[1]
    size = min(CHUNK, num_tokens)
    vocab = AXES["vocab"]
    product = functools.partial(
        jnp.einsum,
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if y_btd.dtype == jnp.float32 else None,
    )

    def chunks(array, *shape):
        array = array.reshape(num_tokens, *shape)
        array = jnp.pad(array, [(0, -num_tokens % size)] + [(0, 0)] * len(shape))
        return array.reshape(-1, size, *shape)

    def body(sums, chunk):
        loss, dhead_vd = sums
        y_cd, target_c, weight_c = chunk
        logits_cv = product("cd,vd->cv", y_cd, head_vd)
        top_c = jax.lax.pmax(jnp.max(logits_cv, axis=1), vocab)
        exp_cv = jnp.exp(logits_cv - top_c[:, None])
        total_c = jax.lax.psum(jnp.sum(exp_cv, axis=1), vocab)
        here_c = target_c - jax.lax.axis_index(vocab) * head_vd.shape[0]
        is_target_cv = jnp.arange(head_vd.shape[0]) == here_c[:, None]
        of_target_c = jax.lax.psum(jnp.sum(jnp.where(is_target_cv, logits_cv, 0), axis=1), vocab)
        loss += jnp.sum(weight_c * (jnp.log(total_c) + top_c - of_target_c))
        if not with_gradients:
            return (loss, dhead_vd), None
        d_logits_cv = weight_c[:, None] * (exp_cv / total_c[:, None] - is_target_cv)
        d_logits_cv = d_logits_cv.astype(y_cd.dtype)
        dy_cd = jax.lax.psum(product("cv,vd->cd", d_logits_cv, head_vd), vocab)
        dhead_vd += product("cv,cd->vd", d_logits_cv, y_cd)
        return (loss, dhead_vd), dy_cd.astype(y_cd.dtype)

    parts = (chunks(y_btd, d), chunks(targets_bt), chunks(weights_bt))
    zeros = jnp.zeros(head_vd.shape if with_gradients else (), jnp.float32)
    (loss, dhead_vd), dy = jax.lax.scan(body, (jnp.float32(0), zeros), parts)
    if not with_gradients:
        return loss
    dy_btd = dy.reshape(-1, d)[:num_tokens].reshape(y_btd.shape)
    return loss, dy_btd, reduce_scatter(dhead_vd.astype(y_btd.dtype), partition_spec(None, "embed"))
