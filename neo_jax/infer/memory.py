"""How much context fits: the cache's size against the memory that is free."""

import contextlib
import os
import re
from pathlib import Path

import jax
from jax.sharding import Mesh

from neo_jax.errors import InputError
from neo_jax.model.kv_cache import num_bytes
from neo_jax.model_config import ModelConfig

# What prefill and compiled programs may take besides parameters and cache.
_RESERVED_SHARE = 0.15
# Longer rows slow every step on a CPU, where nothing but memory is gained by filling it.
_CPU_LENGTH = 4096
_LEAST_LENGTH = 256
_MEMINFO = Path("/proc/meminfo")


def fitting_length(
    c: ModelConfig,
    params: dict,
    mesh: Mesh,
    slots: int,
    kv_dtype: str,
    wanted: int | None,
    free_bytes: int | None = None,
) -> int:
    """Tokens for which each slot of a cache has room.

    Args:
      wanted: as many, or None for as many as fit, at most the model's context.
      free_bytes: on each device, beside the parameters; default: what it says itself.

    Raises:
      InputError: when they do not fit, with the numbers and what to change.
    """
    device = mesh.devices.flat[0]
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if free_bytes is None:
        free_bytes = _free_bytes(device, mesh.size, parameters)
    usable = free_bytes * (1 - _RESERVED_SHARE)
    per_token = num_bytes(c, kv_dtype) * slots / mesh.size
    fits, context = int(usable / per_token), c.max_position_embeddings
    if wanted is not None and wanted > context:
        raise InputError(f"max_length {wanted} exceeds the model's context of {context}")
    if wanted is None:
        wanted = min(context, _CPU_LENGTH) if device.platform == "cpu" else min(context, fits)
        wanted = max(wanted, min(context, _LEAST_LENGTH))
    if wanted > fits:
        raise InputError(
            f"{slots} slots of {wanted} tokens need {per_token * wanted / 1e9:.2f} GB of cache on "
            f"each device ({kv_dtype}); beside {parameters / mesh.size / 1e9:.2f} GB of parameters "
            f"{usable / 1e9:.2f} GB are free: lower slots or max_length (up to {fits} would fit), "
            "use kv_dtype int8, or more devices"
        )
    return wanted


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
