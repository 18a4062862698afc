"""The prefill rows of one step: which chunks fit into it, on each device."""

import dataclasses

from neo_jax.infer.sequence import Prefill, Sequence, chunk_stop, num_rows


@dataclasses.dataclass(frozen=True)
class RowLimits:
    """What one step may take on each device."""

    block_size: int
    rows: int  # more only for an image that is larger
    context_blocks: int  # that the chunks of one program see together; more only for one alone

    def max_rows(self, max_image_tokens: int) -> int:
        """The most rows that a step can have, given the largest image."""
        with_image = -(-(self.rows * self.block_size // 2 + max_image_tokens) // self.block_size)
        return max(self.rows, with_image + 1) if max_image_tokens else self.rows

    @property
    def short(self) -> int:
        """So many rows are a short prompt, which may go beside a long one."""
        return self.rows // 4


class PrefillRows:
    """The chunks chosen for a step so far."""

    def __init__(self, limits: RowLimits, devices: int):
        self.prefills: list[Prefill] = []
        self._limits = limits
        self._rows, self._context = [0] * devices, [0] * devices
        # The first chunk decides: if it needs no cached keys, nor do those beside it.
        self._is_fresh: bool | None = None

    @property
    def is_full(self) -> bool:
        return min(self._rows) >= self._limits.rows

    def is_first(self, device: int) -> bool:
        return not self._rows[device]

    def find_stop(
        self, sequence: Sequence, start: int, device: int, is_short: bool = False
    ) -> int | None:
        """Where the sequence's next chunk would end; None if it has to wait for another step.

        Args:
          is_short: it must end the sequence and take few rows.
        """
        limits, is_first = self._limits, self.is_first(device)
        if self._is_fresh and start:
            return None
        room = limits.rows - self._rows[device]
        if is_short:
            room = min(room, limits.short)
        if room < 1:
            return None
        stop = chunk_stop(sequence, start, room, limits.block_size)
        if is_first and not is_short:
            return stop
        # A chunk that is small and not the last would cost a step with cached keys later.
        is_worth = stop == sequence.num_tokens or (not is_short and 2 * room >= limits.rows)
        if num_rows(start, stop, limits.block_size) > room or not is_worth:
            return None
        fits = self._is_fresh or is_first or self._fits_context(device, stop)
        return stop if fits else None

    def leaves_room(self, sequence: Sequence, start: int, stop: int, other: Sequence) -> bool:
        """Whether [start, stop) of `sequence` fits beside the next chunk of the long `other`."""
        size, first = self._limits.block_size, other.num_computed_tokens
        rows = self._limits.rows - num_rows(start, stop, size)
        other_stop = chunk_stop(other, first, rows, size)
        context = other_stop + -(-stop // size) * size
        is_fresh = not (start or first)
        fits = is_fresh or self._fits_context(other.device, context)
        return fits and num_rows(first, other_stop, size) <= rows

    def decide(self, start: int) -> None:
        """The first chunk of a step, from `start`, decides whether it needs cached keys."""
        if self._is_fresh is None:
            self._is_fresh = start == 0

    def add(self, sequence: Sequence, stop: int) -> None:
        start, device, size = sequence.num_computed_tokens, sequence.device, self._limits.block_size
        self.decide(start)
        self._rows[device] += num_rows(start, stop, size)
        self._context[device] += -(-stop // size)
        self.prefills.append(Prefill(sequence, start, stop, stop == sequence.num_tokens))

    def _fits_context(self, device: int, tokens: int) -> bool:
        blocks = -(-tokens // self._limits.block_size)
        return self._context[device] + blocks <= self._limits.context_blocks
