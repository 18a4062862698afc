"""Evaluation on several hosts: data parallel, a whole model on each, rows divided among them.

`Hosts` exchanges bytes between the processes, so that they need no common disk.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from neo_jax import distributed
from neo_jax.model_config import ModelConfig
from neo_jax.sharding import make_mesh
from neo_jax.weights.checkpoint import find_checkpoint
from neo_jax.weights.published import open_published


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The index of this process, and how many share the rows."""

    index: int = 0
    count: int = 1

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """The bytes of every host, in the order of hosts.

        A collective: every host must make the same calls in the same order.
        """
        if self.count == 1:
            return [data]
        sizes = multihost_utils.process_allgather(np.array([len(data)], np.int32))
        padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        rows = multihost_utils.process_allgather(padded).reshape(self.count, -1)
        return [
            row[:size].tobytes() for row, size in zip(rows, sizes.reshape(-1).tolist(), strict=True)
        ]


def join(is_pod: bool = False) -> Hosts:
    """Joins the other processes, if this is one of several (`neo_jax.distributed.join`)."""
    distributed.join(is_pod)
    return Hosts(jax.process_index(), jax.process_count())


def config_of(model: str | Path) -> ModelConfig:
    """The configuration of a published directory or a checkpoint; reads no weights."""
    checkpoint = find_checkpoint(model)
    return checkpoint.config if checkpoint else open_published(model)[0]


def local_mesh(config: ModelConfig) -> Mesh:
    """A mesh of this host's devices only, for a model of its own."""
    return make_mesh(None, jax.local_devices(), num_key_value_heads=config.num_key_value_heads)
