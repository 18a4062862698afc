"""How long the kernels take: for attention visited blocks of a packing, times counted cycles.

The compiler makes no estimate of a kernel. `kernel_cycles.json` has the instruction bundles of each
kernel's steps, counted in the final program (benchmarks/kernel_cycles.py).
"""

import dataclasses
import functools
import json
import math
from pathlib import Path

import numpy as np

from neo_jax.model_config import ModelConfig
from neo_jax.plan.chips import Chip
from neo_jax.plan.hlo import Computation, Instruction
from neo_jax.plan.kernel_costs import (
    BLOCK,
    BLOCK_K,
    BLOCK_Q,
    MOVING,
    PRODUCTS,
    STREAMED,
    flops_per_pair,
    moved_bytes,
)
from neo_jax.plan.packing import Row, visited
from neo_jax.plan.timeline import KernelWork

TABLE = Path(__file__).with_name("kernel_cycles.json")


@dataclasses.dataclass(frozen=True)
class Steps:
    """Of one kernel on one chip. A step takes a visit of all query heads that share a key head."""

    block_q: int
    block_k: int
    masked: float  # cycles of one query head, on one core
    full: float  # the same, where no mask is needed
    step: float  # cycles of a step, whatever it computes

    def cycles(self, visits: float, whole: float, groups: int, heads_of_group: int) -> float:
        """Of visits, of which `whole` need no mask, of so many groups of query heads."""
        bodies = (visits - whole) * self.masked + whole * self.full
        return groups * (heads_of_group * bodies + visits * self.step)


@functools.cache
def table() -> dict[str, dict[str, Steps]]:
    """Kernel to chip to what its steps take."""
    kernels = json.loads(TABLE.read_text())["kernels"]
    return {
        kernel: {chip: Steps(**numbers) for chip, numbers in chips.items()}
        for kernel, chips in kernels.items()
    }


@functools.cache
def streamed() -> dict[str, dict[str, int]]:
    """Kernel to chip to the cycles of a block, of kernels that do the same with every block."""
    return json.loads(TABLE.read_text())["streamed"]


def kernel_name(one: Instruction) -> str | None:
    """Which kernel a call is of: the longest name that it has in it."""
    where, known = f"{one.name} {one.op_name}", [*PRODUCTS, *STREAMED, *MOVING]
    return max((name for name in known if name in where), key=len, default=None)


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention on one device, of one call of a kernel."""

    chip: Chip
    rows: tuple[Row, ...]  # sampled rows of the packing; none: of a prompt, one row at a time
    rows_per_call: float  # that one device computes in a call; a part of one with context parallel
    groups: int  # key heads of a device
    heads_of_group: int
    widths: tuple[int, int]  # of queries and keys, of values

    def work(self, one: Instruction, where: Computation) -> KernelWork | None:
        """Of a call; of attention the mean over the sampled rows. None for an unknown kernel."""
        name = kernel_name(one) or ""
        if name in MOVING:
            operands = [where.by_name[operand] for operand in one.operands]
            return KernelWork(moved_bytes(one, operands) / self.chip.hbm_bandwidth)
        if name in STREAMED:
            return self._streamed(name, one)
        steps = table().get(name, {}).get(self.chip.name)
        if steps is None:
            return None
        visits, whole = self._mean_visits(steps, one, where)
        cycles = steps.cycles(visits, whole, self.groups, self.heads_of_group)
        pairs = visits * steps.block_q * steps.block_k * self.groups * self.heads_of_group
        return KernelWork(
            self.rows_per_call * cycles / self.chip.cores / self.chip.clock,
            self.rows_per_call * pairs * flops_per_pair(name, *self.widths),
        )

    def _streamed(self, name: str, one: Instruction) -> KernelWork | None:
        cycles = streamed().get(name, {}).get(self.chip.name)
        if cycles is None:
            return None
        heads = [array for array in one.arrays if len(array.shape) == 3]
        blocks = sum(math.prod(array.shape) for array in heads) / BLOCK
        # One after the other, on one core; or as fast as memory gives and takes them.
        result_bytes = sum(array.bytes for array in heads)
        moved = STREAMED[name] * result_bytes / self.chip.hbm_bandwidth
        return KernelWork(max(blocks * cycles / self.chip.clock, moved))

    @functools.cached_property
    def imbalance(self) -> float:
        """Visits of the fullest sampled row, per visits of the mean one: what all wait for."""
        visits = self._visits(BLOCK_Q, BLOCK_K)[:, 0]
        return float(visits.max() / visits.mean())

    def _mean_visits(self, steps: Steps, one: Instruction, where: Computation) -> np.ndarray:
        if self.rows:
            return self._visits(steps.block_q, steps.block_k).mean(axis=0)
        operands = [where.by_name[operand].arrays[0].shape for operand in one.operands]
        queries, keys = [shape[1] for shape in operands if len(shape) == 3][:2]
        # A chunk of a prompt sees what was before it, and itself up to the diagonal.
        down, across = queries / steps.block_q, keys / steps.block_k
        on_diagonal = max(1.0, down)
        below = down * (across - down) + down * (down - 1) / 2
        return np.array([max(0.0, below) + on_diagonal, max(0.0, below)])

    def _visits(self, block_q: int, block_k: int) -> np.ndarray:
        return np.array([visited(row, block_q, block_k) for row in self.rows], float)


def attention(
    chip: Chip, c: ModelConfig, rows: tuple[Row, ...], rows_per_call: float, tensor: int
) -> Attention:
    """Of a model whose heads are split over `tensor` devices."""
    groups = max(1, c.num_key_value_heads // tensor)
    heads = c.num_attention_heads // c.num_key_value_heads
    return Attention(chip, rows, rows_per_call, groups, heads, (c.qk_width, c.head_dim))
