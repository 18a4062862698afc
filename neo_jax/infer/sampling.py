"""From logits to the next token, inside a jitted step; and on the host, when to stop.

Each row has its own settings, in arrays: one program serves every mixture of requests. Nothing is
sorted: where top_k and top_p cut is found by bisection over the bits of float32, exactly for all k
and p, in up to 32 passes of compare and add over [B, V] each, and none where no row asks for it.
Where all rows are greedy, no random numbers are drawn.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax.errors import InputError
from neo_jax.sharding import spec

# What `is_repeating` calls a loop: far above the blank rows of a long form, or a line of dots.
MIN_REPEATS, MIN_REPEATED_TOKENS, MAX_BLOCK = 8, 1024, 512
REPETITION_INTERVAL = 32  # tokens from one check to the next


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one request's tokens are chosen and where they end. InputError: a value out of range."""

    temperature: float = 0.0  # divides the logits; 0 takes the likeliest token
    top_k: int = 0  # only the k likeliest tokens, and ties with the k-th; 0 is off
    top_p: float = 1.0  # only the likeliest tokens that have this probability together; 1 is off
    repetition_penalty: float = 1.0  # divides positive, multiplies negative logits; 1 is off
    max_new_tokens: int = 512  # the answer is cut there
    stop: tuple[str, ...] = ()  # texts that end the answer and are no part of it
    stop_token_ids: tuple[int, ...] = ()  # tokens that do, besides the model's own
    seed: int = 0  # of the request's random numbers
    penalize_prompt: bool = False  # officially only generated tokens are penalised
    stop_on_repetition: bool = False  # end an answer that goes round in a loop

    def __post_init__(self):
        def check(name: str, kind: type, low: float, high: float, allowed: str) -> None:
            value: Any = getattr(self, name)
            is_number = isinstance(value, kind) and not isinstance(value, bool)
            if not is_number or not low <= cast(float, value) <= high:
                raise InputError(f"{name} is {value!r}: use {allowed}")

        check("temperature", Real, 1e-6 if self.temperature else 0, 1e6, "0 or from 1e-6 to 1e6")
        check("top_k", Integral, 0, 2**31 - 1, "0 (off) or a positive integer")
        check("top_p", Real, 0, 1, "a number from 0 to 1; 1 is off")
        check("repetition_penalty", Real, 0.01, 100, "a number from 0.01 to 100; 1 is off")
        check("max_new_tokens", Integral, 1, math.inf, "an integer of 1 or more")
        check("seed", Integral, 0, 2**32 - 1, "an integer from 0 to 4294967295")
        for name in ("penalize_prompt", "stop_on_repetition"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} is {getattr(self, name)!r}: use True or False")
        stop = tuple(self.stop) if isinstance(self.stop, tuple | list) else (self.stop,)
        if not all(isinstance(text, str) and text for text in stop):
            raise InputError(f"stop is {stop!r}: use texts of one or more characters")
        given = self.stop_token_ids
        ids = tuple(given) if isinstance(given, Sequence | np.ndarray) else (given,)
        ids = tuple(int(i) if isinstance(i, Integral) else i for i in ids)
        if not all(isinstance(number, int) and number >= 0 for number in ids):
            raise InputError(f"stop_token_ids is {ids!r}: use token ids, 0 or more")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", ids)


def row_settings(rows: Sequence[Sampling]) -> dict[str, np.ndarray]:
    """What the device reads of each row's settings: arrays [B]. Filters of greedy rows are off.

    top_p travels as 1 - top_p, the number that HF compares with: less exact if taken in float32.
    """
    return {
        "temperature_b": np.array([row.temperature for row in rows], np.float32),
        "top_k_b": np.array([row.top_k * (row.temperature > 0) for row in rows], np.int32),
        "tail_b": np.array([(1 - row.top_p) * (row.temperature > 0) for row in rows], np.float32),
        "penalty_b": np.array([row.repetition_penalty for row in rows], np.float32),
        "seed_b": np.array([row.seed for row in rows], np.uint32),
    }


def first_seen(sampling: Sampling, prompt_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """[V] bool: the tokens that are penalised before any is generated."""
    return np.isin(np.arange(vocab_size), prompt_ids if sampling.penalize_prompt else ())


def add_seen(seen_bv: jax.Array, tokens_b: jax.Array) -> jax.Array:
    """`seen_bv` with each row's new token."""
    return seen_bv | (jnp.arange(seen_bv.shape[1]) == tokens_b[:, None])


def sample(
    logits_bv: jax.Array, seen_bv: jax.Array, settings: dict, index_b: jax.Array
) -> jax.Array:
    """The next token of each row, [B] int32. For use inside jit, under the mesh.

    A token follows from its row's logits, settings and index alone: not from its place in the
    batch, its neighbours or the mesh. Its random key is `fold_in(key(seed), index)`, Threefry.

    Args:
      logits_bv: [B, V] float32; may be split over the vocabulary.
      seen_bv: [B, V] bool: the tokens to penalise (`first_seen`, `add_seen`).
      settings: `row_settings` of the rows.
      index_b: [B] int32: how many tokens the row has generated before.
    """
    # On each device's own rows, so that no search waits for another device.
    arrays = (logits_bv, seen_bv, settings, index_b)
    specs = jax.tree.map(lambda x: spec("batch", *[None] * (x.ndim - 1)), arrays)
    arrays = jax.tree.map(jax.sharding.reshard, arrays, specs)
    return jax.shard_map(_sample_rows, in_specs=specs, out_specs=spec("batch"))(*arrays)


def _sample_rows(logits_bv, seen_bv, settings, index_b):
    greedy_b = jnp.argmax(_penalized(logits_bv, seen_bv, settings), axis=1).astype(jnp.int32)
    is_sampled_b = settings["temperature_b"] > 0

    def draw_row(seed, index, kept_v):
        # Threefry by name: under vmap, other generators let a row's place decide its numbers.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), index)
        return jax.random.categorical(key, kept_v).astype(jnp.int32)

    def draw():
        kept_bv = processed_logits(logits_bv, seen_bv, settings)
        drawn_b = jax.vmap(draw_row)(settings["seed_b"], index_b, kept_bv)
        return jnp.where(is_sampled_b, drawn_b, greedy_b)

    return jax.lax.cond(jnp.any(is_sampled_b), draw, lambda: greedy_b)


def _penalized(logits_bv, seen_bv, settings):
    penalty_b1 = settings["penalty_b"][:, None]
    lower_bv = jnp.where(logits_bv < 0, logits_bv * penalty_b1, logits_bv / penalty_b1)
    return jnp.where(seen_bv, lower_bv, logits_bv)


def processed_logits(logits_bv: jax.Array, seen_bv: jax.Array, settings: dict) -> jax.Array:
    """What `sample` draws from, [B, V]: -inf is out. Greedy rows are penalised, no more.

    As HF Transformers 4.57.1: penalty, temperature, top_k, top_p. Of equal logits where top_p
    cuts, the lower ids are out.
    """
    temperature_b1 = settings["temperature_b"][:, None]
    x_bv = _penalized(logits_bv, seen_bv, settings)
    x_bv = x_bv / jnp.where(temperature_b1 > 0, temperature_b1, 1)
    # Integers in the order of the floats: the bits, turned round where negative; -0 equals 0.
    bits_bv = jax.lax.bitcast_convert_type(x_bv, jnp.int32)
    order_bv = jnp.where(x_bv == 0, 0, bits_bv ^ ((bits_bv >> 31) & 0x7FFFFFFF))
    least_b, most_b = jnp.min(order_bv, axis=1), jnp.max(order_bv, axis=1)
    top_k_b, tail_b, id_v = settings["top_k_b"], settings["tail_b"], jnp.arange(x_bv.shape[1])

    def reaches_k(kth_b):
        return jnp.sum(order_bv >= kth_b[:, None], axis=1, dtype=jnp.int32) >= top_k_b

    has_top_k_b = (top_k_b > 0) & (top_k_b < len(id_v))
    kth_b = _largest(reaches_k, least_b, jnp.where(has_top_k_b, most_b, least_b))
    # Probabilities but for a factor: without it, equal logits add up without rounding.
    weight_bv = jnp.exp(x_bv - jnp.max(x_bv, axis=1, keepdims=True))
    weight_bv = jnp.where(order_bv >= kth_b[:, None], weight_bv, 0)
    mass_b = tail_b * jnp.sum(weight_bv, axis=1)

    def is_out(edge_b, id_b):
        is_equal_bv, is_lower_bv = order_bv == edge_b[:, None], order_bv < edge_b[:, None]
        return is_lower_bv | (is_equal_bv & (id_v < id_b[:, None]))

    def fits(edge_b, id_b):
        return jnp.sum(jnp.where(is_out(edge_b, id_b), weight_bv, 0), axis=1) <= mass_b

    # First the logit where the tail ends, then the id among its equals, of which one must stay.
    edge_b = _largest(lambda x_b: fits(x_b, 0 * x_b), kth_b, jnp.where(tail_b > 0, most_b, kth_b))
    is_edge_bv = order_bv == edge_b[:, None]
    first_b = jnp.argmax(is_edge_bv, axis=1)
    last_b = jnp.where(tail_b > 0, jnp.max(jnp.where(is_edge_bv, id_v, 0), axis=1), first_b)
    id_b = _largest(lambda id_b: fits(edge_b, id_b), first_b, last_b)
    return jnp.where(is_out(edge_b, id_b), -jnp.inf, x_bv)


def _largest(holds: Callable, low_b: jax.Array, high_b: jax.Array) -> jax.Array:
    """Per row the last integer from `low_b` to `high_b` up to which all hold; `low_b` must."""

    def halve(bounds):
        low_b, high_b = bounds
        middle_b = (low_b | high_b) - ((low_b ^ high_b) >> 1)  # rounded up; a sum would overflow
        holds_b = holds(middle_b)
        return jnp.where(holds_b, middle_b, low_b), jnp.where(holds_b, high_b, middle_b - 1)

    return jax.lax.while_loop(lambda lh: jnp.any(lh[0] < lh[1]), halve, (low_b, high_b))[0]


class Answer:
    """One request's tokens as they come: their text, and whether and why they are finished.

    Attributes:
      sampling: its settings.
      token_ids: all so far, the stop token included.
      text: what they say before a stop token or text. A last character that lacks bytes waits.
      finish_reason: None, "stop", "length" or "repetition".
    """

    def __init__(self, sampling: Sampling, decode: Callable, stop_ids: Sequence[int] = ()):
        """`decode`: the tokenizer's, ids to text; `stop_ids`: at which the model itself stops."""
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.sampling, self._decode = sampling, decode
        self._waiting: list[int] = []
        self._stop_ids = {*sampling.stop_token_ids, *stop_ids}

    def add(self, token: int) -> str | None:
        """Takes the next token; returns `finish_reason`."""
        s = self.sampling
        self.token_ids.append(token)
        if token not in self._stop_ids:
            self._waiting.append(token)
        text = self.text + self._decode(self._waiting)
        found = [text.find(stop, max(0, len(self.text) - len(stop) + 1)) for stop in s.stop]
        end = min((place for place in found if place >= 0), default=len(text))
        if token in self._stop_ids or end < len(text):
            self.finish_reason = "stop"
        elif len(self.token_ids) >= s.max_new_tokens:
            self.finish_reason = "length"
        elif s.stop_on_repetition and len(self.token_ids) % REPETITION_INTERVAL == 0:
            self.finish_reason = "repetition" if is_repeating(self.token_ids) else None
        if self.finish_reason or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.text, self._waiting = text[:end], []
        return self.finish_reason


def is_repeating(token_ids: Sequence[int]) -> bool:
    """Whether the tokens end in one block again and again.

    The rule: at the end there are MIN_REPEATS or more equal blocks of n <= MAX_BLOCK tokens each,
    MIN_REPEATED_TOKENS or more in all.
    """
    for n in range(1, min(MAX_BLOCK, len(token_ids) // MIN_REPEATS) + 1):
        covered = n * max(MIN_REPEATS, math.ceil(MIN_REPEATED_TOKENS / n))
        is_likely = covered <= len(token_ids) and token_ids[-1] == token_ids[-1 - n]
        if is_likely and token_ids[n - covered :] == token_ids[-covered:-n]:
            return True
    return False
