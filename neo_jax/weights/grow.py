"""Grows a NEO from a plain Qwen3 checkpoint: the tensors of the new model, made when they are read.

Qwen3 layer i becomes layer i + pre_buffer. Its H/W queries start from quarters 1 and 3 of each T
query head, once for H and again for W; H/W keys are 0 and H/W norms 1, so that on text the model is
still that Qwen3. The Pre-Buffer and the patch embedding are random, or another NEO's.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping

import numpy as np

from neo_jax.errors import InputError
from neo_jax.model_config import PATCH_CHANNELS, ModelConfig
from neo_jax.weights.mapping import Index, expected_tensors
from neo_jax.weights.tensor_files import Tensor

_NEO, _LAYER = "language_model.", "language_model.model.layers."
# What a head's quarters 1 and 3 of four (counted from 1) are taken for, twice.
_QUARTERS = (0, 2, 0, 2)


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is computed when a part of it is asked for."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[Index], np.ndarray]

    def __getitem__(self, index: Index) -> np.ndarray:
        return self.read(index)


def grown_tensors(
    qwen3: Mapping[str, Tensor],
    c: ModelConfig,
    *,
    seed: int = 0,
    neo: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor | LazyTensor]:
    """Every tensor of the grown model by its published key.

    Args:
      qwen3: tensors of a plain Qwen3 checkpoint.
      c: the grown model; its `vocab_size` may exceed the checkpoint's: new rows are 0.
      seed: of the random tensors. Each depends on the seed and its key alone.
      neo: tensors of a NEO to take Pre-Buffer and patch embedding from.

    Raises:
      InputError: listing every tensor that is missing, left over or of another shape.
    """
    result, used, problems = {}, set(), []

    def take(source: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
        if key not in source:
            problems.append(f"missing: {key} {shape}")
            return _constant(shape, "F32", 0)
        tensor = source[key]
        rows_may_grow = key.endswith(("embed_tokens.weight", "lm_head.weight"))
        same = tensor.shape[1:] == shape[1:] if rows_may_grow else tensor.shape == shape
        if not same or tensor.shape[0] > shape[0]:
            problems.append(f"wrong shape: {key} is {tensor.shape}, the model asks for {shape}")
        return tensor

    for key, shape in expected_tensors(c).items():
        layer, rest = _split(key)
        if layer is not None and layer >= c.num_pre_buffer_layers:
            source = f"model.layers.{layer - c.num_pre_buffer_layers}.{rest}"
            base = source.replace("_proj_hw", "_proj").replace("_norm_h", "_norm")
            base = base.replace("_norm_w", "_norm")
            used.add(base)
            if "q_proj_hw" in rest:
                tensor = take(qwen3, base, shape)
                result[key] = LazyTensor(shape, tensor.dtype, _quarters(tensor, c.head_dim))
            elif "k_proj_hw" in rest or source != base:
                dtype = qwen3[base].dtype if base in qwen3 else "F32"
                result[key] = _constant(shape, dtype, 0 if "k_proj_hw" in rest else 1)
            else:
                result[key] = take(qwen3, source, shape)
        elif layer is None and key.startswith(_NEO):
            source = key.removeprefix(_NEO)
            used.add(source)
            result[key] = _with_rows(take(qwen3, source, shape), shape)
        elif neo is not None:
            result[key] = take(neo, key, shape)
        else:
            result[key] = _fresh(key, shape, seed, c)
    if c.tie_word_embeddings:
        used.add("lm_head.weight")
    problems += [
        f"unknown: {key} {tensor.shape}" for key, tensor in qwen3.items() if key not in used
    ]
    if problems:
        raise InputError(f"{len(problems)} tensors do not fit:\n  " + "\n  ".join(problems))
    return result


def qwen3_config(
    hf: Mapping, pre_buffer: int, *, vocab_size: int, tied: bool, vision_hidden_size: int = 1024
) -> ModelConfig:
    """The grown model's configuration, from a Qwen3's config.json."""
    llm = {**hf, "rope_theta_hw": 1e4, "extra_num_layers": pre_buffer}
    if isinstance(hf.get("num_hidden_layers"), int):
        llm["num_hidden_layers"] = hf["num_hidden_layers"] + pre_buffer
    llm["vocab_size"] = vocab_size
    vision = {"hidden_size": vision_hidden_size}
    return ModelConfig.from_hf(
        {"llm_config": llm, "vision_config": vision}, tie_word_embeddings=tied
    )


def _split(key: str) -> tuple[int | None, str]:
    if not key.startswith(_LAYER):
        return None, key
    number, _, rest = key.removeprefix(_LAYER).partition(".")
    return int(number), rest


def _quarters(tensor: Tensor, head_dim: int) -> Callable[[Index], np.ndarray]:
    def read(index: Index) -> np.ndarray:
        rows = tensor[index]  # the key table asks for whole heads
        quarters = rows.reshape(-1, 4, head_dim // 4, rows.shape[-1])
        return quarters[:, _QUARTERS].reshape(rows.shape)

    return read


def _constant(shape: tuple[int, ...], dtype: str, value: float) -> LazyTensor:
    def read(index: Index) -> np.ndarray:
        sizes = [len(range(*part.indices(n))) for part, n in zip(index, shape, strict=True)]
        return np.full(sizes, value, np.float32)

    return LazyTensor(shape, dtype, read)


def _with_rows(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | LazyTensor:
    """The tensor, with rows of zeros after it if it has fewer."""
    available = tensor.shape[0]
    if available >= shape[0]:
        return tensor

    def read(index: Index) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        rows = tensor[(slice(min(start, available), min(stop, available)), *index[1:])]
        return np.pad(rows, [(0, stop - start - len(rows))] + [(0, 0)] * (len(shape) - 1))

    return LazyTensor(shape, tensor.dtype, read)


def _fresh(key: str, shape: tuple[int, ...], seed: int, c: ModelConfig) -> LazyTensor:
    """A new tensor: norms 1, matrices ~ N(0, 0.02), convolutions uniform in +-1/sqrt(fan_in)."""
    if "norm" in key:
        return _constant(shape, "F32", 1)

    def read(index: Index) -> np.ndarray:
        rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
        if key.startswith("vision_model."):
            fan_in = PATCH_CHANNELS if "patch_embedding" in key else 4 * c.vision_hidden_size
            return rng.uniform(-(fan_in**-0.5), fan_in**-0.5, shape).astype(np.float32)[index]
        return rng.standard_normal(shape, np.float32)[index] * np.float32(0.02)

    return LazyTensor(shape, "F32", read)
