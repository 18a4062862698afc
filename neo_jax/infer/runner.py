"""The runner: executes the scheduler's steps on the devices.

It owns the parameters as inference reads them, and the state that the programs change
(`programs.py`). It keeps nothing of a request: a step says all that a program needs. So when a
program fails, a new empty state is all it takes to go on.
"""

import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from collections.abc import Sequence as List

import jax
import numpy as np
from jax.sharding import Mesh

from neo_jax.batch import to_device
from neo_jax.infer import buckets, programs, sampling
from neo_jax.infer.memory import PoolSize
from neo_jax.infer.prefill_arrays import PrefillArrays
from neo_jax.infer.prefill_rows import RowLimits
from neo_jax.infer.sequence import Prefill, Sequence, Step
from neo_jax.model.kv_cache import STACKS
from neo_jax.model.layer_stack import place_for_inference
from neo_jax.model_config import ModelConfig
from neo_jax.sharding import batch_rows, put


class ProgramError(Exception):
    """A program failed, and the state that it was given is lost.

    Attributes:
      sequences: those that it computed.
    """

    def __init__(self, sequences: List[Sequence], error: Exception):
        super().__init__(repr(error))
        self.sequences = tuple(sequences)


@contextlib.contextmanager
def _program_of(sequences: List[Sequence]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ProgramError(sequences, error) from error


@dataclasses.dataclass(frozen=True)
class InFlight:
    """A program under way: the tokens that it samples, still on the devices, and their owners."""

    tokens: jax.Array
    owners: list[tuple[int, Sequence]]  # place among the tokens, sequence
    sequences: List[Sequence]  # all that it computes

    def read(self) -> Iterator[tuple[int, Sequence]]:
        """Waits for the tokens.

        Raises:
          ProgramError: when the program has failed.
        """
        with _program_of(self.sequences):
            tokens = np.asarray(self.tokens)
        return ((int(tokens[place]), sequence) for place, sequence in self.owners)


class Runner:
    """The device's side of an engine. Its methods are for one thread, under the mesh.

    Args:
      limits: of a step's prefills, as the scheduler keeps them.
      max_image_tokens: of the largest image that `warm` prepares for.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict,
        mesh: Mesh,
        pool: PoolSize,
        kv_dtype: str,
        *,
        limits: RowLimits,
        max_image_tokens: int,
    ):
        self._config, self._mesh, self._pool, self._kv_dtype = config, mesh, pool, kv_dtype
        self._devices = batch_rows(mesh)
        stacks = {name: params[name] for name in STACKS if name in params}
        self._params = {**params, **place_for_inference(stacks, mesh)}
        self._max_blocks = -(-pool.max_length // pool.block_size)
        image = min(max_image_tokens, pool.max_length)
        self._shapes = buckets.Shapes.of(limits, self._max_blocks, image)
        self._state = self._new_state()

    def execute(self, step: Step) -> list[InFlight]:
        """Dispatches the programs of a step.

        Raises:
          ProgramError: when one of them fails at once.
        """
        sent = []
        if step.prefills:
            with _program_of([one.sequence for one in step.prefills]):
                sent.append(self._prefill(step.prefills))
        if step.decodes:
            with _program_of(step.decodes):
                sent.append(self._decode(step.decodes))
        return sent

    def rebuild(self) -> None:
        """A new, empty state after a program that failed has taken the old one with it."""
        self._state = None
        gc.collect()  # an error that is about in a cycle of frames may hold the old one
        self._state = jax.block_until_ready(self._new_state())

    def free(self) -> None:
        """Gives the memory back. Nothing may be executed after that."""
        self._state = self._params = None

    def plan(self) -> list[buckets.PrefillBucket]:
        """The shapes of prefill that `warm` compiles; decoding has one."""
        return self._shapes.all()

    def warm(self) -> int:
        """Compiles every planned program; returns how many. Sequences keep what they have."""
        for bucket in self.plan():
            arrays = PrefillArrays(self._devices, bucket, self._pool.block_size)
            self._run_prefill(arrays, [])
        self._put_seen(0, 0, np.array([], np.int32))
        jax.block_until_ready(self._decode([]).tokens)
        return len(self.plan()) + 2

    def _new_state(self) -> programs.State:
        pool = self._pool
        with jax.set_mesh(self._mesh):
            return programs.new_state(
                self._config, self._params, pool.lanes, pool.num_blocks, self._max_blocks,
                self._kv_dtype, pool.block_size,
            )  # fmt: skip

    def _prefill(self, chunks: List[Prefill]) -> InFlight:
        size = self._pool.block_size
        arrays = PrefillArrays(self._devices, self._shapes.bucket_for(chunks, size), size)
        owners = []
        for one in chunks:
            last = arrays.add(one)
            if one.samples:
                owners.append((last, one.sequence))
                self._set_seen(one.sequence)
        sequences = [one.sequence for one in chunks]
        return InFlight(self._run_prefill(arrays, owners), owners, sequences)

    def _run_prefill(self, arrays: PrefillArrays, owners: List[tuple[int, Sequence]]) -> jax.Array:
        """`owners`: rows that end a sequence, so that its next token is sampled."""
        count = len(arrays.rows["block_r"])
        is_last_r, lane_r = np.zeros(count, bool), np.zeros(count, np.int32)
        index_r, table_rn = np.zeros(count, np.int32), np.zeros((count, self._max_blocks), np.int32)
        settings = [sampling.Sampling()] * count
        for row, sequence in owners:
            is_last_r[row], lane_r[row] = True, sequence.lane
            index_r[row] = len(sequence.output_ids)
            table_rn[row, : len(sequence.blocks)] = sequence.blocks
            settings[row] = sequence.request.settings
        rows = {
            **arrays.rows, "is_last_r": is_last_r, "lane_r": lane_r, "index_r": index_r,
            "block_table_rn": table_rn, "settings": sampling.row_settings(settings),
        }  # fmt: skip
        placed = jax.tree.map(self._put, rows) | {"batch": to_device(arrays.batch, self._mesh)}
        tokens_r, self._state = programs.prefill(self._config, self._params, self._state, placed)
        return tokens_r

    def _decode(self, sequences: List[Sequence]) -> InFlight:
        block_b = np.zeros(self._pool.lanes * self._devices, np.int32)
        owners = []
        for sequence in sequences:
            lane = sequence.device * self._pool.lanes + sequence.lane
            position = sequence.num_computed_tokens  # of the token that is fed
            block_b[lane] = sequence.blocks[position // self._pool.block_size]
            owners.append((lane, sequence))
        tokens_b, self._state = programs.decode(
            self._config, self._params, self._state, self._put(block_b)
        )
        return InFlight(tokens_b, owners, sequences)

    def _set_seen(self, sequence: Sequence) -> None:
        """Before a sequence's next token is sampled: which tokens its settings penalise."""
        settings, example = sequence.request.settings, sequence.request.example
        if settings.repetition_penalty == 1:
            return
        prompt = example.tokens if settings.penalize_prompt else ()
        ids = np.unique(np.array([*prompt, *sequence.output_ids], np.int32))
        self._put_seen(sequence.device, sequence.lane, ids)

    def _put_seen(self, device: int, lane: int, ids: np.ndarray) -> None:
        # Always as many as a sequence can have: one program, which only penalties need.
        length = min(self._pool.max_length, self._config.vocab_size)
        padded = np.full(length, self._config.vocab_size, np.int32)
        padded[: len(ids)] = ids
        where = np.int32(device), np.int32(lane)
        self._state = programs.set_seen(self._state, *where, padded)

    def _put(self, array: np.ndarray) -> jax.Array:
        return put(array, self._mesh, "batch", *[None] * (array.ndim - 1))
