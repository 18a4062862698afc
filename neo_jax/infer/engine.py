"""The engine: requests that come and go, answered together by one model.

    submit ──▶ prepare (threads) ──▶ scheduler ──▶ runner (device) ──▶ handle
               image to patches      one step      programs            text, result

One thread drives scheduler and runner. It is one program ahead of what it reads, so reading tokens
never makes the device wait. Whoever submits, streams or cancels only talks to that thread.

An answer does not depend on what runs beside it: a token computes with its own sequence alone.
"""

import collections
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import jax
from jax.sharding import Mesh

from neo_jax.data.tokenizer import NeoTokenizer
from neo_jax.errors import InputError
from neo_jax.infer import sampling
from neo_jax.infer.handle import RequestHandle
from neo_jax.infer.intake import Intake
from neo_jax.infer.memory import PoolSize, choose_pool
from neo_jax.infer.prefill_arrays import PromptArrays
from neo_jax.infer.prepare import Prepared, Preparer
from neo_jax.infer.request import Request, Result
from neo_jax.infer.runner import InFlight, Runner
from neo_jax.infer.scheduler import Scheduler
from neo_jax.infer.sequence import Sequence
from neo_jax.model.kv_cache import KV_DTYPES
from neo_jax.model_config import ModelConfig
from neo_jax.sharding import batch_rows

NO_USAGE = {"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0}


@dataclasses.dataclass(eq=False)
class Entry:
    """A request that the scheduler knows."""

    handle: RequestHandle
    prepared: Prepared
    answer: sampling.Answer
    sequence: Sequence


class Engine:
    """Answers requests with one model.

    Args:
      prepare: what turns its requests into prompts.
      slots: lanes, the sequences that run at once; rounded up to a multiple of the mesh's batch
        size. Default: from memory and device (`memory.py`).
      max_length: tokens of a prompt and its answer, at most; default: the model's context.
      kv_dtype: of the pool: "bfloat16", "float32" or "int8"; default: as the model computes.
      pool_tokens: tokens for which the pool has room on each device of the batch axes; default:
        what fits into free memory.
      block_size: tokens of a block; default: by the device.
      prefill_budget: tokens of a prefill; longer prompts are prefilled chunk by chunk.
      max_pixels: of the largest image that requests may have; programs are planned for it.
      reuse_prefixes: compute a prefix that prompts have in common once.
      workers: threads that prepare requests; default: the processors of this machine.

    Raises:
      InputError: when model and pool cannot fit, with the numbers.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict,
        mesh: Mesh,
        tokenizer: NeoTokenizer,
        prepare: Preparer,
        *,
        slots: int | None = None,
        max_length: int | None = None,
        kv_dtype: str | None = None,
        pool_tokens: int | None = None,
        block_size: int | None = None,
        prefill_budget: int = 2048,
        max_pixels: int | None = None,
        reuse_prefixes: bool = True,
        workers: int | None = None,
    ):
        kv_dtype = kv_dtype or config.dtype
        if kv_dtype not in KV_DTYPES:
            raise InputError(f"kv_dtype {kv_dtype!r}: use one of {', '.join(KV_DTYPES)}")
        given = {"slots": slots, "prefill_budget": prefill_budget, "workers": workers}
        for name, value in (given | {"pool_tokens": pool_tokens}).items():
            if value is not None and value < 1:
                raise InputError(f"{name} must be 1 or more")
        self.config, self.mesh, self.tokenizer = config, mesh, tokenizer
        devices = batch_rows(mesh)
        self.pool: PoolSize = choose_pool(
            config, params, mesh, kv_dtype, slots=slots, max_length=max_length,
            pool_tokens=pool_tokens, block_size=block_size,
        )  # fmt: skip
        self.slots, self.max_length = self.pool.lanes * devices, self.pool.max_length
        self._scheduler = Scheduler(
            devices=devices, lanes=self.pool.lanes, num_blocks=self.pool.num_blocks,
            block_size=self.pool.block_size, max_length=self.max_length,
            prefill_budget=prefill_budget, reuse_prefixes=reuse_prefixes,
        )  # fmt: skip
        image_tokens = (max_pixels or config.max_pixels) // 1024
        self._runner = Runner(
            config, params, mesh, self.pool, kv_dtype,
            limits=self._scheduler.limits, max_image_tokens=image_tokens,
        )  # fmt: skip
        self._intake = Intake(prepare, workers, self._wake)
        self._entries: dict[Sequence, Entry] = {}
        self._numbers = 0
        self._cancelled: list[RequestHandle] = []
        self._open_requests, self._open_iterators = 0, 0
        self._news = threading.Condition()
        self._is_awake, self._is_closed = False, False
        self._thread: threading.Thread | None = None
        self._num_generated = 0

    def submit(
        self, request: Request, prepare: Callable[[Request], Prepared] | None = None
    ) -> RequestHandle:
        """Takes a request, from any thread; its handle has the answer as it comes.

        What is wrong with the request is an error of its result.

        Args:
          prepare: in place of the engine's own, for a request that is prepared already.

        Raises:
          InputError: when the engine is closed.
        """
        with self._news:
            if self._is_closed:
                raise InputError("the engine is closed: make another with neo.engine(...)")
            if self._thread is None:
                self._thread = threading.Thread(target=self._drive, name="neo-engine", daemon=True)
                self._thread.start()
            self._open_requests += 1
        handle = RequestHandle(request, self._cancel)
        handle.add_done_callback(self._count_out)
        self._intake.put(handle, prepare)
        return handle

    def stats(self) -> dict[str, int]:
        """Counts of the scheduler and the queue before it."""
        counts = dataclasses.asdict(self._scheduler.stats())
        counts["waiting"] += self._intake.size
        return counts | {"generated_tokens": self._num_generated}

    @contextlib.contextmanager
    def iterator(self) -> Iterator[None]:
        """While an iterator over results is open: its end may wait for the caller."""
        with self._news:
            self._open_iterators += 1
        try:
            yield
        finally:
            with self._news:
                self._open_iterators -= 1

    def retire(self) -> None:
        """Closes the engine when what it answers has ended.

        Raises:
          InputError: while an iterator over its results is open.
        """
        with self._news:
            if self._open_iterators:
                raise InputError(
                    "the engine still answers other requests: finish or close their iterator "
                    "first, or use the engine's own options"
                )
            self._news.wait_for(lambda: self._is_closed or not self._open_requests)
        self.close()

    def close(self) -> None:
        """Cancels what is under way and frees the engine's memory."""
        with self._news:
            self._is_closed = True
        self._intake.close()
        self._wake()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join()
        self._runner.free()

    def warm(self) -> int:
        """Compiles every planned program; returns how many. For an idle engine."""
        return self._runner.warm()

    def plan(self):
        """The shapes of programs that may be compiled."""
        return self._runner.plan()

    # The engine's thread.

    def _wake(self) -> None:
        with self._news:
            self._is_awake = True
            self._news.notify_all()

    def _count_out(self, handle: RequestHandle) -> None:
        with self._news:
            self._open_requests -= 1
            self._news.notify_all()

    def _cancel(self, handle: RequestHandle) -> None:
        with self._news:
            self._cancelled.append(handle)
        self._wake()

    def _drive(self) -> None:
        in_flight: collections.deque[InFlight] = collections.deque()
        with jax.set_mesh(self.mesh):
            while not self._is_closed:
                self._admit()
                if not self._step(in_flight):
                    with self._news:
                        self._news.wait_for(lambda: self._is_awake or self._is_closed)
                        self._is_awake = False
        self._fail(None)

    def _step(self, in_flight: collections.deque) -> bool:
        """Dispatches one step, then reads the step before; False if there was neither."""
        try:
            step = self._scheduler.schedule()
            sent = self._runner.execute(step) if step else []
            if step:
                self._scheduler.commit(step)
            in_flight.extend(sent)
            has_news = len(in_flight) > 0
            while len(in_flight) > len(sent):
                self._collect(in_flight.popleft())
            return has_news
        except Exception as error:  # of a program: its requests fail, the engine goes on
            in_flight.clear()
            self._fail(error)
            self._runner.rebuild()
            return True

    def _admit(self) -> None:
        """Hands prepared requests to the scheduler; those that cannot be answered end here."""
        for handle, prepared in self._intake.take():
            try:
                entry = None if handle.is_done else self._make_entry(handle, prepared)
            except Exception as error:  # one bad request must not end the others
                handle.finish(_failed(error))
                entry = None
            if entry is None:
                self._intake.release(handle)
                continue
            self._entries[entry.sequence] = entry
            self._scheduler.add(entry.sequence)
        with self._news:
            cancelled, self._cancelled = self._cancelled, []
        for handle in cancelled:
            self._end_cancelled(handle)

    def _make_entry(self, handle: RequestHandle, prepared: Future) -> Entry:
        ready: Prepared = prepared.result()
        settings = handle.request.sampling
        self._scheduler.check(len(ready.prefix_ids), settings.max_new_tokens)
        answer = sampling.Answer(settings, self.tokenizer.decode, [self.tokenizer.turn_end_id])
        self._numbers += 1
        sequence = Sequence(
            self._numbers, ready.prefix_ids, ready.example.is_image, settings.max_new_tokens
        )
        sequence.request = PromptArrays(ready.example, settings)
        return Entry(handle, ready, answer, sequence)

    def _end_cancelled(self, handle: RequestHandle) -> None:
        if handle.is_done:
            return
        for entry in self._entries.values():
            if entry.handle is handle:
                self._scheduler.cancel(entry.sequence)
                self._end(entry, "cancelled")
                return
        self._intake.release(handle)
        handle.finish(Result("", (), "cancelled", dict(NO_USAGE)))

    def _collect(self, landed: InFlight) -> None:
        for token, sequence in landed.read():
            entry = self._entries.get(sequence)
            if entry is None:  # it was cancelled or had ended before this token was known
                self._scheduler.append(sequence, token, is_finished=True)
                continue
            reason = entry.answer.add(token)
            self._num_generated += 1
            self._scheduler.append(sequence, token, is_finished=reason is not None)
            if reason:
                self._end(entry, reason)
            else:
                entry.handle.update(entry.answer.text)

    def _end(self, entry: Entry, reason: str) -> None:
        del self._entries[entry.sequence]
        self._intake.release(entry.handle)
        usage = {
            "prompt_tokens": len(entry.prepared.prefix_ids),
            "cached_tokens": entry.sequence.num_cached_tokens,
            "completion_tokens": len(entry.answer.token_ids),
        }
        ids = tuple(entry.answer.token_ids)
        entry.handle.finish(Result(entry.answer.text.strip(), ids, reason, usage))

    def _fail(self, error: Exception | None) -> None:
        """Ends what is under way: those that run by the error, or all when the engine closes."""
        running = set(self._scheduler.reset())
        for sequence, entry in list(self._entries.items()):
            if error is None:
                self._end(entry, "cancelled")
            elif sequence in running:
                del self._entries[sequence]
                self._intake.release(entry.handle)
                entry.handle.finish(_failed(error, "a device program failed: "))


def _failed(error: Exception, what: str = "") -> Result:
    text = str(error) if isinstance(error, InputError) else what + repr(error)
    return Result("", (), "error", dict(NO_USAGE), text)
