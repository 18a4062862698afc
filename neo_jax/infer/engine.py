"""Continuous batching: many requests through a fixed number of slots, answered as they finish.

Worker threads prepare requests while the device runs. Prompts are put into free slots chunk by
chunk; every step then gives all filled slots one more token, and a finished slot is given away at
once. The device is always one program ahead of the host, which reads tokens while the next runs.

An answer does not depend on what runs beside it: each row computes with its own slot alone.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh

from neo_jax.batch import to_device
from neo_jax.data.example import Example, collate
from neo_jax.data.tokenizer import NeoTokenizer
from neo_jax.errors import InputError
from neo_jax.infer import buckets, programs, sampling
from neo_jax.infer.memory import fitting_length
from neo_jax.infer.prepare import Prepared, Preparer
from neo_jax.infer.request import Request, Result
from neo_jax.infer.slots import Sequence, Slot, choose
from neo_jax.infer.waiting_queue import WaitingQueue
from neo_jax.model.kv_cache import KV_DTYPES, STACKS
from neo_jax.model.layer_stack import place_for_inference
from neo_jax.model_config import PATCH_CHANNELS, ModelConfig
from neo_jax.sharding import batch_rows, put

Event = tuple[int, sampling.Answer | None, Result | None]


class Engine:
    """Answers requests with one model.

    Args:
      prepare: what turns its requests into prompts.
      slots: requests that run at once; rounded up to a multiple of the mesh's batch size.
      max_length: tokens of a prompt and its answer; default: what fits into free memory, at
        most the model's context (`memory.py`).
      kv_dtype: of the cache: "bfloat16", "float32" or "int8"; default: as the model computes.
      prefill_budget: tokens of a prefill; longer prompts are put in chunk by chunk.
      reuse_prefixes: compute a prefix that prompts have in common once.
      workers: threads that prepare requests.

    Raises:
      InputError: when model and cache cannot fit, with the numbers.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict,
        mesh: Mesh,
        tokenizer: NeoTokenizer,
        prepare: Preparer,
        *,
        slots: int = 8,
        max_length: int | None = None,
        kv_dtype: str | None = None,
        prefill_budget: int = 2048,
        reuse_prefixes: bool = True,
        workers: int = 4,
    ):
        kv_dtype = kv_dtype or config.dtype
        if kv_dtype not in KV_DTYPES:
            raise InputError(f"kv_dtype {kv_dtype!r}: use one of {', '.join(KV_DTYPES)}")
        if slots < 1 or prefill_budget < 1 or workers < 1:
            raise InputError("slots, prefill_budget and workers must be 1 or more")
        self.config, self.params, self.mesh, self.tokenizer = config, params, mesh, tokenizer
        self._devices = batch_rows(mesh)
        self._slots_per_device = -(-slots // self._devices)
        self.slots = self._slots_per_device * self._devices
        self.max_length = fitting_length(config, params, mesh, self.slots, kv_dtype, max_length)
        self._budget, self._reuse, self._workers = prefill_budget, reuse_prefixes, workers
        self._prepare, self._is_busy = prepare, False
        self._clock = itertools.count()
        self._slots = [
            Slot(device, number, np.zeros(0, np.int64))
            for device in range(self._devices)
            for number in range(self._slots_per_device)
        ]
        stacks = {name: params[name] for name in STACKS if name in params}
        self.params = {**params, **place_for_inference(stacks, mesh)}
        with jax.set_mesh(mesh):
            length = max(self.max_length, buckets.ROW)
            self._state = programs.new_state(config, self.params, self.slots, length, kv_dtype)

    def plan(self) -> list[buckets.PrefillBucket]:
        """The shapes of prefill that may be compiled, besides one decode and one copy."""
        image_tokens = self.config.max_pixels // 1024
        return buckets.plan(self.max_length, image_tokens, budget=self._budget)

    def warm(self) -> int:
        """Compiles every planned program; returns how many."""
        for chunk in self.plan():
            self._prefill(chunk, [])
        self._decode([])
        if self.slots > self._devices:
            self._copy(self._slots[0], self._slots[0])
        return len(self.plan()) + 1 + (self.slots > self._devices)

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Result]]:
        """Yields (number of the request, its result) as they finish, in any order.

        Requests are taken from the iterable as they are needed. One that is bad gives a result
        with an `error`; the others go on.
        """
        for index, _, result in self.events(requests):
            if result:
                yield index, result

    def events(
        self, requests: Iterable[Request], prepare: Callable[[Request], Prepared] | None = None
    ) -> Iterator[Event]:
        """Yields (number, answer so far, result or None) at each token.

        Args:
          prepare: in place of the engine's own, for requests that are prepared already.

        Raises:
          InputError: while another iterator is under way: both would drive the same slots.
        """
        if self._is_busy:
            raise InputError(
                "the engine is still answering other requests: finish or close their iterator first"
            )
        with ThreadPoolExecutor(self._workers) as threads:
            queue = WaitingQueue(requests, prepare or self._prepare, threads, 2 * self.slots)
            self._is_busy = True
            try:
                yield from self._loop(queue)
            finally:
                queue.cancel()
                for slot in self._slots:  # an abandoned run's slots are free again
                    slot.sequence = None
                self._is_busy = False

    def _loop(self, queue: WaitingQueue) -> Iterator[Event]:
        in_flight: collections.deque = collections.deque()  # (sampled tokens, their owners)
        while True:
            yield from self._admit(queue, wait=not in_flight and not self._running())
            prefilling = [sequence for sequence in self._running() if not sequence.is_prefilled]
            sent = len(in_flight)
            if prefilling:
                in_flight.append(self._next_prefill(prefilling))
            if active := [sequence for sequence in self._running() if self._can_decode(sequence)]:
                in_flight.append(self._decode(active))
            if not in_flight and queue.is_empty and not self._running():
                return
            keep = len(in_flight) - sent
            while len(in_flight) > keep:
                yield from self._collect(*in_flight.popleft())

    def _running(self) -> list[Sequence]:
        sequence = [slot.sequence for slot in self._slots if slot.sequence]
        return sorted(sequence, key=lambda sequence: sequence.index)

    def _can_decode(self, sequence: Sequence) -> bool:
        return (
            sequence.is_prefilled
            and sequence.num_scheduled_tokens < sequence.answer.sampling.max_new_tokens
        )

    def _admit(self, queue: WaitingQueue, wait: bool) -> Iterator[Event]:
        """Gives free slots to prepared requests; those that cannot be answered end here."""
        for index, request, future in queue.prepared(wait):
            try:
                prepared = future.result()
                self._check_length(len(prepared.prefix_ids), request.sampling.max_new_tokens)
            except Exception as error:  # one bad request must not end the others
                queue.remove(index)
                said = str(error) if isinstance(error, InputError) else repr(error)
                yield index, None, Result("", (), "error", {}, said)
                continue
            chosen = choose(prepared, self._slots, self._reuse)
            if chosen is None:
                if all(slot.sequence for slot in self._slots):
                    return
                continue
            queue.remove(index)
            slot, source, prefix = chosen
            if prefix and source is not slot:
                self._copy(source, slot)
            stop_ids = [self.tokenizer.turn_end_id]
            answer = sampling.Answer(request.sampling, self.tokenizer.decode, stop_ids)
            slot.sequence = Sequence(index, prepared, answer, slot, prefix, prefix)
            slot.prefix_ids, slot.used = prepared.prefix_ids[:prefix], next(self._clock)

    def _check_length(self, prompt: int, new: int) -> None:
        if prompt + new > self.max_length:
            raise InputError(
                f"the prompt has {prompt} tokens; with max_new_tokens={new} that exceeds the "
                f"context of {self.max_length}: lower max_pixels or max_new_tokens"
                + ", or raise max_length"
                * (self.max_length < self.config.max_position_embeddings)
            )

    def _next_prefill(self, prefilling: list[Sequence]) -> tuple[jax.Array, list]:
        """Extends the oldest request that is being filled, and those that fit beside it."""
        is_fresh, parts, used = prefilling[0].num_computed_tokens == 0, [], collections.Counter()
        for sequence in prefilling:
            start, stop = sequence.next_chunk(self._budget)
            size, device = buckets.rows_for(stop - start), sequence.slot.device
            fits = used[device] + size <= buckets.rows_for(self._budget)
            if sequence is prefilling[0] or ((start == 0) == is_fresh and fits):
                parts.append((sequence, used[device]))
                used[device] += size
        return self._prefill(buckets.bucket_for(max(used.values()), is_fresh), parts)

    def _prefill(self, chunk: buckets.PrefillBucket, parts: list[tuple[Sequence, int]]):
        """Orders the next chunk of each request, from the given row of its device on."""
        count = chunk.rows * self._devices
        examples = [_EMPTY] * count
        slot_r, start_r = np.zeros(count, np.int32), np.zeros(count, np.int32)
        end_rt = np.zeros((count, buckets.ROW), np.int32)
        is_last_r, seen_rv = np.zeros(count, bool), np.zeros((count, self.config.vocab_size), bool)
        settings, owners = [sampling.Sampling()] * count, []
        for sequence, first in parts:
            start, stop = sequence.next_chunk(self._budget)
            row = sequence.slot.device * chunk.rows + first
            for row, begin in enumerate(range(start, stop, buckets.ROW), row):  # noqa: B020
                end = min(begin + buckets.ROW, stop)
                examples[row] = sequence.part(begin, end)
                slot_r[row], start_r[row] = sequence.slot.number, begin
                end_rt[row, : end - begin] = sequence.ends[begin:end]
            if stop == sequence.length:
                is_last_r[row], settings[row] = True, sequence.answer.sampling
                prompt = sequence.prepared.example.tokens
                seen_rv[row] = sampling.first_seen(settings[row], prompt, self.config.vocab_size)
                sequence.num_scheduled_tokens += 1
                owners.append((row, sequence))
            sequence.num_computed_tokens = stop
            sequence.slot.prefix_ids = sequence.prepared.prefix_ids[:stop]
        batch = collate(examples, buckets.ROW, 4 * buckets.ROW)
        with jax.set_mesh(self.mesh):
            arrays = {"slot_r": slot_r, "start_r": start_r, "end_rt": end_rt}
            arrays |= {"is_last_r": is_last_r, "seen_rv": seen_rv}
            arrays |= {"settings": sampling.row_settings(settings)}
            arrays = jax.tree.map(self._put, arrays) | {"batch": to_device(batch, self.mesh)}
            tokens_r, self._state = programs.prefill(
                self.config, self.params, self._state, arrays, chunk.is_fresh
            )
        return tokens_r, owners

    def _decode(self, active: list[Sequence]):
        places = [self._slots.index(sequence.slot) for sequence in active]
        is_active_b = np.zeros(self.slots, bool)
        is_active_b[places] = True
        with jax.set_mesh(self.mesh):
            tokens_b, self._state = programs.decode(
                self.config, self.params, self._state, self._put(is_active_b)
            )
        for sequence in active:
            sequence.num_scheduled_tokens += 1
        return tokens_b, list(zip(places, active, strict=True))

    def _copy(self, source: Slot, target: Slot) -> None:
        from_d = np.zeros(self._devices, np.int32)
        to_d = from_d.copy()
        from_d[source.device], to_d[source.device] = source.number, target.number
        with jax.set_mesh(self.mesh):
            self._state = programs.copy_slot(self._state, self._put(from_d), self._put(to_d))

    def _collect(self, tokens: jax.Array, owners: list[tuple[int, Sequence]]) -> Iterator[Event]:
        tokens = np.asarray(tokens)
        for place, sequence in owners:
            answer = sequence.answer
            if answer.finish_reason:
                continue  # in_flight before its end was known
            # The token before this one has been fed, so its keys and values are in the slot.
            fed = answer.token_ids[-1:]
            sequence.slot.prefix_ids = np.concatenate(
                [sequence.slot.prefix_ids, np.array(fed, np.int64)]
            )
            answer.add(int(tokens[place]))
            result = None
            if answer.finish_reason:
                sequence.slot.sequence = None
                usage = {
                    "prompt_tokens": sequence.length,
                    "cached_tokens": sequence.num_cached_tokens,
                    "completion_tokens": len(answer.token_ids),
                }
                ids = tuple(answer.token_ids)
                result = Result(answer.text.strip(), ids, answer.finish_reason, usage)
            yield sequence.index, answer, result

    def _put(self, array: np.ndarray) -> jax.Array:
        return put(array, self.mesh, "batch", *[None] * (array.ndim - 1))


_EMPTY = Example(
    tokens=np.zeros(0, np.int32),
    thw=np.zeros((0, 3), np.int32),
    is_image=np.zeros(0, bool),
    patches=np.zeros((0, PATCH_CHANNELS), np.uint8),
    patch_hw=np.zeros((0, 2), np.int32),
)
