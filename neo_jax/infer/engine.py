"""The engine: requests that come and go, answered together by one model.

    submit ──▶ prepare (threads) ──▶ scheduler ──▶ runner (device) ──▶ handle
               image to patches      one step      programs            text, result

What is here only talks to the thread that drives scheduler and runner (`engine_core.py`). An
answer does not depend on what runs beside it: a token computes with its own sequence alone.
"""

import contextlib
import threading
import weakref
from collections.abc import Iterator

from jax.sharding import Mesh

from neo_jax.data.tokenizer import NeoTokenizer
from neo_jax.errors import InputError
from neo_jax.infer.buckets import PrefillBucket
from neo_jax.infer.engine_core import EngineCore
from neo_jax.infer.handle import RequestHandle
from neo_jax.infer.intake import Prepare
from neo_jax.infer.memory import PoolSize, choose_pool
from neo_jax.infer.request import Request
from neo_jax.infer.runner import Runner
from neo_jax.infer.scheduler import Scheduler
from neo_jax.model.kv_cache import KV_DTYPES
from neo_jax.model_config import IMAGE_FACTOR, ModelConfig
from neo_jax.sharding import batch_rows


class Engine:
    """Answers requests with one model, until it is closed or nobody refers to it any more.

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
        prepare: Prepare,
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
        sizes = {"slots": slots, "max_length": max_length, "pool_tokens": pool_tokens}
        sizes |= {"block_size": block_size, "prefill_budget": prefill_budget, "workers": workers}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise InputError(f"{name} must be 1 or more")
        devices = batch_rows(mesh)
        self.pool: PoolSize = choose_pool(
            config, params, mesh, kv_dtype, slots=slots, max_length=max_length,
            pool_tokens=pool_tokens, block_size=block_size,
        )  # fmt: skip
        self.slots, self.max_length = self.pool.lanes * devices, self.pool.max_length
        scheduler = Scheduler(
            devices=devices, lanes=self.pool.lanes, num_blocks=self.pool.num_blocks,
            block_size=self.pool.block_size, max_length=self.max_length,
            prefill_budget=prefill_budget, reuse_prefixes=reuse_prefixes,
        )  # fmt: skip
        self._runner = Runner(
            config, params, mesh, self.pool, kv_dtype, limits=scheduler.limits,
            max_image_tokens=(max_pixels or config.max_pixels) // IMAGE_FACTOR**2,
        )  # fmt: skip
        self._core = EngineCore(scheduler, self._runner, mesh, tokenizer, prepare, workers)
        # The thread does not refer to the engine, but a handle does until its request has ended.
        weakref.finalize(self, self._core.stop).atexit = False
        self._lock, self._open_iterators = threading.Lock(), 0

    @property
    def is_closed(self) -> bool:
        """It takes no more requests: it was closed, or could not go on after a failure."""
        return self._core.requests.is_closed

    def submit(self, request: Request, prepare: Prepare | None = None) -> RequestHandle:
        """Takes a request, from any thread; its handle has the answer as it comes.

        What is wrong with the request is an error of its result.

        Args:
          prepare: in place of the engine's own, for a request that is prepared already.

        Raises:
          InputError: when the engine is closed.
        """
        handle = RequestHandle(request, self._cancel)
        self._core.submit(handle, prepare)
        return handle

    def stats(self) -> dict[str, int]:
        """Counts of the scheduler (`SchedulerStats`), and `generated_tokens`.

        `waiting` includes requests whose images are not prepared yet. All is as it was after the
        latest step, or the latest request that ended.
        """
        return self._core.stats()

    @contextlib.contextmanager
    def iterator(self) -> Iterator[None]:
        """While an iterator over results is open, whose end may wait for the caller."""
        with self._lock:
            self._open_iterators += 1
        try:
            yield
        finally:
            with self._lock:
                self._open_iterators -= 1

    def retire(self) -> None:
        """Closes the engine when what it answers has ended.

        Raises:
          InputError: while an iterator over its results is open.
        """
        with self._lock:
            if self._open_iterators and not self.is_closed:
                raise InputError(
                    "the engine still answers other requests: finish or close their iterator "
                    "first, or use the engine's own options"
                )
        self._core.requests.wait_until_none()
        self.close()

    def close(self) -> None:
        """Cancels what is under way and frees the engine's memory."""
        self._core.close()

    def warm(self) -> int:
        """Compiles every planned program, so that no request waits for that; returns how many.

        Raises:
          InputError: when the engine is closed.
          RuntimeError: when a program cannot be compiled or run.
        """
        return self._core.warm()

    def plan(self) -> list[PrefillBucket]:
        """The shapes of prefill that requests within the engine's limits may need."""
        return self._runner.plan()

    def _cancel(self, handle: RequestHandle) -> None:
        self._core.cancel(handle)
