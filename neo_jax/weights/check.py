"""Checks every value of a published checkpoint and describes its tensors."""

import collections
import math
import re
from collections.abc import Callable, Mapping

import numpy as np

from neo_jax.errors import InputError
from neo_jax.model_config import ModelConfig
from neo_jax.weights.tensor_files import Tensor

_BLOCK_BYTES = 128 * 2**20


def check_values(
    c: ModelConfig,
    tensors: Mapping[str, Tensor],
    on_bytes_read: Callable[[int], None] = lambda size: None,
) -> str:
    """Returns a table of the tensors by kind: count, type, largest value, parameters, name, shape.

    Tensors of all layers that differ only in the layer's number are one kind.

    Args:
      c: the model; `mapping.check_tensors` has already compared keys and shapes with it.
      tensors: by published key.
      on_bytes_read: called with the bytes of each block read, for a progress bar.

    Raises:
      InputError: listing every tensor with NaN or infinite values, and how many it has.
    """
    kinds, problems = collections.defaultdict(list), []
    for key, tensor in tensors.items():
        bad, largest = 0, 0.0
        for block in tensor.blocks(_BLOCK_BYTES):
            values = block.astype(np.float32)
            finite = np.isfinite(values)
            bad += values.size - np.count_nonzero(finite)
            largest = max(
                largest, float(np.abs(values, where=finite, out=np.zeros_like(values)).max())
            )
            on_bytes_read(block.nbytes)
        if bad:
            problems.append(f"{tensor.file.name}: {key} has {bad} NaN or infinite values")
        kinds[re.sub(r"\.\d+\.", ".*.", key), tensor.shape, tensor.dtype].append(largest)
    if problems:
        raise InputError("\n  ".join([f"{len(problems)} tensors are not finite:", *problems]))
    lines = [f"{'tensors':>7}  {'type':4}  {'largest':>9}  {'parameters':>14}  name and shape"]
    for (name, shape, dtype), largest in kinds.items():
        count = len(largest) * math.prod(shape)
        lines.append(
            f"{len(largest):7}  {dtype:4}  {max(largest):9.4g}  {count:14,}  {name} {list(shape)}"
        )
    total = sum(math.prod(tensor.shape) for tensor in tensors.values())
    lines.append(
        f"{len(tensors):7}        {'':9}  {total:14,}  {c.qk_layout}, {c.num_pre_buffer_layers} + "
        f"{c.num_post_llm_layers} layers, {'tied' if c.tie_word_embeddings else 'untied'}; "
        "every key, shape and value is as it should be"
    )
    return "\n".join(lines)
