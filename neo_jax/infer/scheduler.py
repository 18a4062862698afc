"""Which sequences run, which blocks they have, and what the device does next.

```
add ──► waiting ──admitted──► running: prefill, chunk by chunk ──► decode ──► finished
           ▲                              │                          │
           └───────────── preempted: blocks and lane taken away ◄────┘
```

First come, first served; what is younger gives way. This module knows nothing of JAX: it is driven
by `schedule` (what to do), `commit` (it has been dispatched) and `append` (a token has landed).

The device runs programs in the order of their dispatch. So blocks may be given away, and prefixes
shared, as soon as the programs that use or write them have been dispatched.
"""

import bisect
import dataclasses

from neo_jax.errors import InputError
from neo_jax.infer.block_manager import BlockManager
from neo_jax.infer.prefill_rows import PrefillRows, RowLimits
from neo_jax.infer.sequence import Prefill, Sequence, Status, Step
from neo_jax.infer.sequence_queue import NUMBER, SequenceQueue

__all__ = ["Prefill", "Scheduler", "SchedulerStats", "Sequence", "Status", "Step"]

# So many first waiting sequences are looked at, for one that fits beside a long prompt.
_WINDOW = 8


@dataclasses.dataclass(frozen=True)
class SchedulerStats:
    """Counts of sequences, and of blocks over all devices."""

    running: int
    waiting: int
    blocks_used: int
    blocks_free: int
    blocks_cached: int  # not used, but findable; they are given away when free ones run out
    prefix_hit_tokens: int  # of prompts, so far
    preemptions: int  # so far


class Scheduler:
    """Gives sequences lanes and blocks.

    Args:
      devices: of the batch axes; each has its own lanes and blocks.
      lanes: sequences that run at once on a device.
      num_blocks: of a device's pool, the null block included.
      block_size: tokens.
      max_length: tokens of a prompt and its answer.
      prefill_budget: tokens of prefill rows in a step, on each device.
      reuse_prefixes: find blocks of equal prefixes.
      max_context_blocks: blocks that the chunks of one continued prefill see together, on each
        device (a sequence alone may see more); default: those of the longest sequence, or 8 per
        row of the budget.
    """

    def __init__(
        self,
        *,
        devices: int,
        lanes: int,
        num_blocks: int,
        block_size: int,
        max_length: int,
        prefill_budget: int,
        reuse_prefixes: bool = True,
        max_context_blocks: int | None = None,
    ):
        self.num_blocks, self.block_size, self.max_length = num_blocks, block_size, max_length
        rows = max(1, prefill_budget // block_size)
        context = max_context_blocks or max(-(-max_length // block_size), 8 * rows)
        self.limits = RowLimits(block_size, rows, context)
        self.must_drain = False
        self._devices, self._reuse = devices, reuse_prefixes
        self._places = (devices, lanes, num_blocks, block_size, reuse_prefixes)
        self._manager = BlockManager(*self._places)
        self._waiting = SequenceQueue()
        self._running: list[Sequence] = []  # by number
        self._step = Step()  # scheduled and not committed, or empty
        self._cancelled: list[Sequence] = []  # in that step
        self._num_preemptions = self._num_hits = 0

    def check(self, prompt_length: int, max_new_tokens: int) -> None:
        """Raises InputError for a request that would not even fit alone."""
        # The last token is not fed, so it needs no place.
        limit = min(self.max_length, (self.num_blocks - 1) * self.block_size + 1)
        if prompt_length + max_new_tokens > limit:
            raise InputError(
                f"the prompt has {prompt_length} tokens; with max_new_tokens={max_new_tokens} that "
                f"exceeds the {limit} tokens that fit: lower max_pixels or max_new_tokens"
            )

    def add(self, sequence: Sequence) -> None:
        """A new sequence waits, or one that `reset` has returned."""
        sequence.status = Status.WAITING
        if self._reuse:
            sequence.hash_blocks(self.block_size)
        self._waiting.add(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence; its blocks are free now, or when its scheduled step is committed."""
        if sequence.status is Status.WAITING:
            self._waiting.remove(sequence)
            sequence.status = Status.FINISHED
        elif sequence.status is Status.RUNNING:
            prefills = (prefill.sequence for prefill in self._step.prefills)
            if sequence in self._step.decodes or sequence in prefills:
                sequence.status = Status.FINISHED
                self._cancelled.append(sequence)
            else:
                self._stop(sequence, Status.FINISHED)

    def schedule(self) -> Step:
        """Reserves blocks and lanes for the next step. Dispatch it, then `commit` it.

        An empty step needs no commit. If `must_drain` is True then, a sequence has to be preempted
        while tokens of it are in flight: append all that are in flight and call again.

        Raises:
          RuntimeError: when the step before was not committed.
        """
        if self._step:
            raise RuntimeError("commit the last step, or reset, before the next one is scheduled")
        self.must_drain = False
        decodes = self._schedule_decodes()
        if self.must_drain:
            return Step()
        plan = PrefillRows(self.limits, self._devices)
        for sequence in [running for running in self._running if not running.is_prefilled]:
            self._extend(plan, sequence)
        self._admit(plan)
        self._step = Step(plan.prefills, decodes)
        return self._step

    def commit(self, step: Step) -> None:
        """The step has been dispatched: what it computes counts, and can be found by others."""
        for prefill in step.prefills:
            sequence = prefill.sequence
            sequence.num_computed_tokens = prefill.stop
            sequence.is_prefilled = prefill.samples
            sequence.num_in_flight += prefill.samples
            self._waiting.wake(self._manager.register(sequence))
        for sequence in step.decodes:
            sequence.num_computed_tokens += 1
            sequence.num_in_flight += 1  # whose block is registered when its tokens are known
        self._step = Step()
        for sequence in self._cancelled:
            self._stop(sequence, Status.FINISHED)
        self._cancelled = []

    def append(self, sequence: Sequence, token: int, is_finished: bool) -> None:
        """A sampled token has landed. One that lands after the sequence's end is dropped."""
        sequence.num_in_flight -= 1
        if sequence.status is not Status.RUNNING:
            return
        sequence.output_ids.append(token)
        self._waiting.wake(self._manager.register(sequence))
        if is_finished:
            self.cancel(sequence)

    def reset(self) -> list[Sequence]:
        """After a failed program: what ran is stopped and returned, and every block is free.

        What waits goes on waiting. Tokens in flight are lost: do not append them.
        """
        stopped = [sequence for sequence in self._running if sequence.status is Status.RUNNING]
        for sequence in self._running:
            sequence.forget_place()
            sequence.num_in_flight, sequence.status = 0, Status.FINISHED
        self._waiting.wake_all()
        self._manager = BlockManager(*self._places)
        self._running, self._cancelled, self._step = [], [], Step()
        return stopped

    def stats(self) -> SchedulerStats:
        pools = self._manager.pools
        used = sum(pool.num_used for pool in pools)
        cached = sum(pool.num_cached for pool in pools)
        return SchedulerStats(
            running=len(self._running),
            waiting=self._waiting.num_waiting,
            blocks_used=used,
            blocks_free=self._devices * (self.num_blocks - 1) - used - cached,
            blocks_cached=cached,
            prefix_hit_tokens=self._num_hits,
            preemptions=self._num_preemptions,
        )

    def _schedule_decodes(self) -> list[Sequence]:
        decodes, size = [], self.block_size
        for sequence in list(self._running):
            if not sequence.is_prefilled:  # or preempted for one before it
                continue
            if len(sequence.output_ids) + sequence.num_in_flight >= sequence.max_new_tokens:
                continue
            is_full = sequence.num_computed_tokens == len(sequence.blocks) * size
            if not is_full or self._grow(sequence):
                decodes.append(sequence)
            elif self.must_drain:
                break
        return decodes

    def _grow(self, sequence: Sequence) -> bool:
        """Gives a sequence one more block, if need be one of the youngest on its device."""
        pool = self._manager.pools[sequence.device]
        while not pool.num_available:
            victim = next(s for s in reversed(self._running) if s.device == sequence.device)
            if victim.num_in_flight:
                self.must_drain = True
                return False
            self._stop(victim, Status.WAITING)
            self._waiting.add(victim)
            victim.num_preemptions += 1
            self._num_preemptions += 1
            if victim is sequence:
                return False
        sequence.blocks.append(pool.allocate())
        return True

    def _extend(self, plan: PrefillRows, sequence: Sequence) -> None:
        """Schedules a running prompt's next chunk, and a short prompt beside a long one."""
        start, device = sequence.num_computed_tokens, sequence.device
        stop = plan.find_stop(sequence, start, device)
        if stop is None:
            return
        if plan.is_first(device) and stop < sequence.num_tokens:
            plan.decide(start)
            if self._admit(plan, beside=sequence):
                stop = plan.find_stop(sequence, start, device)
        plan.add(sequence, stop)

    def _admit(self, plan: PrefillRows, beside: Sequence | None = None) -> bool:
        """Lets waiting sequences run whose next chunk fits into the step, in their order.

        Those that only lack rows may be passed by short ones. For memory and lanes nobody is
        passed.

        Args:
          beside: admit just one short sequence, beside this long one on its device.
        """
        passed, manager = 0, self._manager
        while passed < min(_WINDOW, len(self._waiting)):
            if plan.is_full or not manager.has_free_lane:
                break
            sequence = self._waiting[passed]
            found = manager.find_prefixes(sequence)
            # Others are computing more of its prefix: it waits until they have.
            if computing := manager.find_computing(sequence, max(len(b) for _, b in found)):
                self._waiting.park(sequence, computing[0])
                continue
            found = [(d, blocks) for d, blocks in found if manager.has_room(sequence, d, blocks)]
            if not found:
                break
            place = self._choose_place(plan, sequence, found, passed, beside)
            if place is None:
                passed += 1
                continue
            self._start(sequence, *place)
            if beside:
                plan.add(sequence, sequence.num_tokens)
                return True
            self._extend(plan, sequence)
        return False

    def _choose_place(self, plan, sequence, found, passed, beside):
        """The (device, cached blocks) with the longest prefix, then the most available blocks.

        None if it lacks rows there. Who passes others is short, or finds a device without chunks.
        """
        longest = max(len(blocks) for _, blocks in found)
        found = [(device, blocks) for device, blocks in found if len(blocks) == longest]
        found.sort(key=lambda place: -self._manager.pools[place[0]].num_available)
        start = longest * self.block_size
        for device, blocks in found:
            if beside and device != beside.device:
                continue
            is_short = beside is not None or (passed and not plan.is_first(device))
            stop = plan.find_stop(sequence, start, device, is_short)
            if stop and not (beside and not plan.leaves_room(sequence, start, stop, beside)):
                return device, blocks
        return None

    def _start(self, sequence: Sequence, device: int, cached: list[int]) -> None:
        self._waiting.remove(sequence)
        self._manager.start(sequence, device, cached)
        sequence.status = Status.RUNNING
        bisect.insort(self._running, sequence, key=NUMBER)
        if not sequence.num_preemptions:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self._num_hits += sequence.num_cached_tokens

    def _stop(self, sequence: Sequence, status: Status) -> None:
        sequence.status = status
        del self._running[bisect.bisect_left(self._running, sequence.number, key=NUMBER)]
        self._waiting.wake(self._manager.stop(sequence))
