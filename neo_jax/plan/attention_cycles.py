"""Estimates the time of the kernels. Attention: the blocks of a packing times counted cycles.

The compiler does not estimate kernels. `kernel_cycles.json` has the instruction bundles of each
kernel's steps, counted in the final program (`benchmarks/kernel_cycles.py`); a bundle is a cycle.
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
    BLOCK_K,
    BLOCK_Q,
    MOVING,
    PRODUCTS,
    STREAM_BLOCK,
    STREAMED,
    flops_per_pair,
    moved_bytes,
)
from neo_jax.plan.packing import Row, count_blocks
from neo_jax.plan.timeline import KernelWork

TABLE = Path(__file__).with_name("kernel_cycles.json")


@dataclasses.dataclass(frozen=True)
class Steps:
    """Cycles of a kernel on a chip. A step is one block, for all query heads of a key head."""

    block_q: int
    block_k: int
    masked: float  # cycles of a partial block, of one query head on one core
    full: float  # cycles of a full block, which needs no mask
    step: float  # overhead of a step, once for all query heads

    def cycles(self, blocks: float, full: float, groups: int, heads_of_group: int) -> float:
        """Cycles of so many blocks, `full` of them full ones, for all groups of query heads."""
        bodies = (blocks - full) * self.masked + full * self.full
        return groups * (heads_of_group * bodies + blocks * self.step)


@functools.cache
def table() -> dict[str, dict[str, Steps]]:
    """The cycles of attention kernels, by kernel and chip."""
    kernels = json.loads(TABLE.read_text())["kernels"]
    return {
        kernel: {chip: Steps(**numbers) for chip, numbers in chips.items()}
        for kernel, chips in kernels.items()
    }


@functools.cache
def streamed() -> dict[str, dict[str, int]]:
    """The cycles of a block of streaming kernels, by kernel and chip."""
    return json.loads(TABLE.read_text())["streamed"]


def kernel_name(one: Instruction) -> str | None:
    """The kernel that a call runs: the longest known name in it. None for an unknown one."""
    where, known = f"{one.name} {one.op_name}", [*PRODUCTS, *STREAMED, *MOVING]
    return max((name for name in known if name in where), key=len, default=None)


@dataclasses.dataclass(frozen=True)
class Attention:
    """The work of kernels on one device, from a call's shapes and the packing of rows."""

    chip: Chip
    rows: tuple[Row, ...]  # sampled rows of the packing; none for a prompt, one row at a time
    rows_per_call: float  # of one device and call; less than 1 with context parallelism
    groups: int  # key heads of a device
    heads_of_group: int  # query heads of a key head
    widths: tuple[int, int]  # of queries and keys, and of values

    def work(self, one: Instruction, where: Computation) -> KernelWork | None:
        """The work of a call; of attention, the mean over sampled rows. None for other kernels."""
        name = kernel_name(one) or ""
        if name in MOVING:
            operands = [where.by_name[operand] for operand in one.operands]
            return KernelWork(moved_bytes(one, operands) / self.chip.hbm_bandwidth)
        if name in STREAMED:
            return self._streamed(name, one)
        steps = table().get(name, {}).get(self.chip.name)
        if steps is None:
            return None
        blocks, full = self._mean_blocks(steps, one, where)
        cycles = steps.cycles(blocks, full, self.groups, self.heads_of_group)
        pairs = blocks * steps.block_q * steps.block_k * self.groups * self.heads_of_group
        return KernelWork(
            self.rows_per_call * cycles / self.chip.cores / self.chip.clock,
            self.rows_per_call * pairs * flops_per_pair(name, *self.widths),
        )

    def _streamed(self, name: str, one: Instruction) -> KernelWork | None:
        cycles = streamed().get(name, {}).get(self.chip.name)
        if cycles is None:
            return None
        heads = [array for array in one.arrays if len(array.shape) == 3]
        blocks = sum(math.prod(array.shape) for array in heads) / STREAM_BLOCK
        # Bound by cycles, one block after the other on one core, or by memory.
        result_bytes = sum(array.bytes for array in heads)
        moved = STREAMED[name] * result_bytes / self.chip.hbm_bandwidth
        return KernelWork(max(blocks * cycles / self.chip.clock, moved))

    @functools.cached_property
    def imbalance(self) -> float:
        """Blocks of the longest sampled row over the mean: all devices wait for the longest."""
        blocks = self._count_blocks(BLOCK_Q, BLOCK_K)[:, 0]
        return float(blocks.max() / blocks.mean())

    def _mean_blocks(self, steps: Steps, one: Instruction, where: Computation) -> np.ndarray:
        if self.rows:
            return self._count_blocks(steps.block_q, steps.block_k).mean(axis=0)
        operands = [where.by_name[operand].arrays[0].shape for operand in one.operands]
        queries, keys = [shape[1] for shape in operands if len(shape) == 3][:2]
        # A chunk of a prompt sees what was before it, and itself up to the diagonal.
        down, across = queries / steps.block_q, keys / steps.block_k
        on_diagonal = max(1.0, down)
        below = down * (across - down) + down * (down - 1) / 2
        return np.array([max(0.0, below) + on_diagonal, max(0.0, below)])

    def _count_blocks(self, block_q: int, block_k: int) -> np.ndarray:
        """[rows, 2]: blocks, and full blocks."""
        return np.array([count_blocks(row, block_q, block_k) for row in self.rows], float)


def attention(
    chip: Chip, c: ModelConfig, rows: tuple[Row, ...], rows_per_call: float, tensor: int
) -> Attention:
    """The kernels of a model whose heads are split over `tensor` devices."""
    groups = max(1, c.num_key_value_heads // tensor)
    heads = c.num_attention_heads // c.num_key_value_heads
    return Attention(chip, rows, rows_per_call, groups, heads, (c.qk_width, c.head_dim))
