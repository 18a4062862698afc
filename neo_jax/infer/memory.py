"""The pool's size: how many blocks of keys and values fit into the memory that is free."""

import contextlib
import dataclasses
import os
import re
from pathlib import Path

import jax
from jax.sharding import Mesh

from neo_jax.errors import InputError
from neo_jax.model.kv_cache import num_bytes
from neo_jax.model_config import ModelConfig
from neo_jax.sharding import batch_rows

# What prefill and compiled programs may take besides parameters and pool.
_RESERVED_SHARE = 0.15
_CPU_BLOCK, _BLOCK = 64, 128  # tokens; TPUs and GPUs read whole tiles of 128 lanes
_CPU_LANES, _MAX_LANES = 8, 64
_TOKENS_PER_LANE = 2048  # of a sequence as evaluations have them: a prompt with an image, an answer
_MEMINFO = Path("/proc/meminfo")


@dataclasses.dataclass(frozen=True)
class PoolSize:
    """What each device of the batch axes has.

    Attributes:
      lanes: sequences that run at once.
      num_blocks: of the pool; block 0 is the null block, which no sequence owns.
      block_size: tokens.
      max_length: tokens of one sequence, at most.
    """

    lanes: int
    num_blocks: int
    block_size: int
    max_length: int

    @property
    def tokens(self) -> int:
        """For how many tokens the pool has room."""
        return (self.num_blocks - 1) * self.block_size


def choose_pool(
    c: ModelConfig,
    params: dict,
    mesh: Mesh,
    kv_dtype: str,
    *,
    slots: int | None = None,
    max_length: int | None = None,
    pool_tokens: int | None = None,
    block_size: int | None = None,
    free_bytes: int | None = None,
) -> PoolSize:
    """The pool of an engine.

    Args:
      slots: lanes over all devices; default: one for _TOKENS_PER_LANE tokens of the pool.
      max_length: tokens of one sequence; default: the model's context, or what the pool has.
      pool_tokens: on each device of the batch axes; default: all that fits. On a CPU, where the
        pool takes memory from all other programs: enough for every lane.
      free_bytes: on each device, beside the parameters; default: what it says itself.

    Raises:
      InputError: when they do not fit, with the numbers and what to change.
    """
    device, devices = mesh.devices.flat[0], batch_rows(mesh)
    is_cpu, context = device.platform == "cpu", c.max_position_embeddings
    block_size = block_size or (_CPU_BLOCK if is_cpu else _BLOCK)
    if max_length is not None and max_length > context:
        raise InputError(f"max_length {max_length} exceeds the model's context of {context}")
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if free_bytes is None:
        free_bytes = _free_bytes(device, mesh.size, parameters)
    usable = free_bytes * (1 - _RESERVED_SHARE)
    per_token = num_bytes(c, kv_dtype) * devices / mesh.size
    fits = max(0, int(usable / per_token) // block_size - 1) * block_size
    lanes = None if slots is None else -(-slots // devices)
    if lanes is None:
        by_memory = max(1, min(_MAX_LANES, (pool_tokens or fits) // _TOKENS_PER_LANE))
        lanes = min(_CPU_LANES, by_memory) if is_cpu else by_memory
    wanted, needed = pool_tokens, min(max_length or block_size, context)
    if wanted is None:
        per_lane = max_length or (min(context, _TOKENS_PER_LANE) if is_cpu else context)
        wanted = min(fits, lanes * _rounded(per_lane, block_size))
    if max(wanted, needed) > fits:
        raise InputError(
            f"a pool of {max(wanted, needed)} tokens needs "
            f"{per_token * max(wanted, needed) / 1e9:.2f} GB on each device ({kv_dtype}); beside "
            f"{parameters / mesh.size / 1e9:.2f} GB of parameters {usable / 1e9:.2f} GB are free: "
            f"lower max_length or pool_tokens (up to {fits} would fit), use kv_dtype int8, or more "
            "devices"
        )
    num_blocks = max(wanted, _rounded(needed, block_size)) // block_size
    length = min(max_length or context, num_blocks * block_size)
    return PoolSize(lanes, num_blocks + 1, block_size, length)


def _rounded(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size) * block_size


def _free_bytes(device: jax.Device, num_devices: int, parameters: int) -> int:
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    return _free_host_bytes(parameters) // num_devices


def _free_host_bytes(parameters: int) -> int:
    with contextlib.suppress(OSError):
        # Not the free pages: those of a file that was read, such as a checkpoint, are not among
        # them, but are given away when they are needed.
        if found := re.search(r"^MemAvailable: *(\d+) kB", _MEMINFO.read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") - parameters  # as on macOS
