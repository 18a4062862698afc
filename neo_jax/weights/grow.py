"""Grows a NEO from a plain Qwen3 checkpoint. Its tensors are computed when they are read.

Qwen3 layer i becomes layer i + pre_buffer. Its H/W queries start from quarters 1 and 3 of each T
query head, once for H and again for W. H/W keys are 0 and H/W norms 1: on text, the model still
computes what that Qwen3 does. The Pre-Buffer and the patch embedding are random, or another NEO's.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping

import numpy as np

from neo_jax.errors import InputError
from neo_jax.model_config import PATCH_CHANNELS, ModelConfig
from neo_jax.weights.mapping import expected_tensors
from neo_jax.weights.row import Index
from neo_jax.weights.tensor_files import Tensor

_NEO, _LAYER = "language_model.", "language_model.model.layers."
# The quarters (counted from 0) of a head's T queries that its H queries, then its W queries take.
_QUARTERS = (0, 2, 0, 2)


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor whose parts are computed when they are read, as `Tensor` reads them from a file."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors names it
    read: Callable[[Index], np.ndarray]

    def __getitem__(self, index: Index) -> np.ndarray:
        return self.read(index)


@dataclasses.dataclass
class _Source:
    """A checkpoint's tensors: records which of them were taken, and which do not fit."""

    tensors: Mapping[str, Tensor]
    problems: list[str]
    taken: set[str] = dataclasses.field(default_factory=set)

    def take(self, key: str, shape: tuple[int, ...]) -> Tensor | LazyTensor:
        """The tensor; embedding and head may have fewer rows than `shape`."""
        self.taken.add(key)
        if key not in self.tensors:
            self.problems.append(f"missing: {key} {shape}")
            return _constant(shape, "F32", 0)
        tensor = self.tensors[key]
        rows_may_grow = key.endswith(("embed_tokens.weight", "lm_head.weight"))
        same = tensor.shape[1:] == shape[1:] if rows_may_grow else tensor.shape == shape
        if not same or tensor.shape[0] > shape[0]:
            self.problems.append(
                f"wrong shape: {key} is {tensor.shape}, the model asks for {shape}"
            )
        return tensor


def grown_tensors(
    qwen3: Mapping[str, Tensor],
    c: ModelConfig,
    *,
    seed: int = 0,
    neo: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor | LazyTensor]:
    """The tensors of the grown model, by published key.

    Args:
      qwen3: tensors of a plain Qwen3 checkpoint.
      c: the grown model; its `vocab_size` may exceed the checkpoint's: new rows are 0.
      seed: of the random tensors. Each depends on the seed and its key alone.
      neo: tensors of a NEO to take Pre-Buffer and patch embedding from; default: random ones.

    Raises:
      InputError: listing every tensor that is missing, left over or of another shape.
    """
    problems: list[str] = []
    source, result = _Source(qwen3, problems), {}
    buffer_source = None if neo is None else _Source(neo, problems)
    for key, shape in expected_tensors(c).items():
        layer, rest = _split_layer(key)
        if layer is not None and layer >= c.num_pre_buffer_layers:
            result[key] = _grow_layer(source, layer - c.num_pre_buffer_layers, rest, shape, c)
        elif layer is None and key.startswith(_NEO):
            result[key] = _pad_rows(source.take(key.removeprefix(_NEO), shape), shape)
        elif buffer_source:
            result[key] = buffer_source.take(key, shape)
        else:
            result[key] = _initialise(key, shape, seed, c)
    if c.tie_word_embeddings:
        source.taken.add("lm_head.weight")  # a copy of the embedding
    problems += [
        f"unknown: {key} {tensor.shape}" for key, tensor in qwen3.items() if key not in source.taken
    ]
    if problems:
        raise InputError(f"{len(problems)} tensors do not fit:\n  " + "\n  ".join(problems))
    return result


def qwen3_config(
    hf: Mapping, pre_buffer: int, *, vocab_size: int, tied: bool, vision_hidden_size: int = 1024
) -> ModelConfig:
    """The grown model's configuration.

    Args:
      hf: the content of a Qwen3's config.json.
      pre_buffer: layers of the Pre-Buffer, before Qwen3's own.
      vocab_size: rows of the embedding.
      tied: whether the head is the embedding.
      vision_hidden_size: width of the patch embedding.
    """
    llm = {**hf, "rope_theta_hw": 1e4, "extra_num_layers": pre_buffer}
    if isinstance(hf.get("num_hidden_layers"), int):
        llm["num_hidden_layers"] = hf["num_hidden_layers"] + pre_buffer
    llm["vocab_size"] = vocab_size
    vision = {"hidden_size": vision_hidden_size}
    return ModelConfig.from_hf(
        {"llm_config": llm, "vision_config": vision}, tie_word_embeddings=tied
    )


def _split_layer(key: str) -> tuple[int | None, str]:
    """The layer's number, None outside of layers, and the rest of the key."""
    if not key.startswith(_LAYER):
        return None, key
    number, _, rest = key.removeprefix(_LAYER).partition(".")
    return int(number), rest


def _grow_layer(
    source: _Source, layer: int, rest: str, shape: tuple[int, ...], c: ModelConfig
) -> Tensor | LazyTensor:
    """A tensor of a layer that comes from Qwen3's `layer`; `rest` is its key in the layer."""
    key = f"model.layers.{layer}.{rest}"
    t_key = key.replace("_proj_hw", "_proj").replace("_norm_h", "_norm").replace("_norm_w", "_norm")
    if "q_proj_hw" in rest:
        tensor = source.take(t_key, shape)
        return LazyTensor(shape, tensor.dtype, _repeat_quarters(tensor, c.head_dim))
    if key != t_key:
        dtype = source.tensors[t_key].dtype if t_key in source.tensors else "F32"
        return _constant(shape, dtype, 0 if "k_proj_hw" in rest else 1)
    return source.take(key, shape)


def _repeat_quarters(tensor: Tensor, head_dim: int) -> Callable[[Index], np.ndarray]:
    """Reads H/W query weights from T query weights: the _QUARTERS of each head."""

    def read(index: Index) -> np.ndarray:
        rows = tensor[index]  # the key table asks for whole heads
        quarters = rows.reshape(-1, 4, head_dim // 4, rows.shape[-1])
        return quarters[:, _QUARTERS].reshape(rows.shape)

    return read


def _constant(shape: tuple[int, ...], dtype: str, value: float) -> LazyTensor:
    """A tensor of one value."""

    def read(index: Index) -> np.ndarray:
        sizes = [len(range(*part.indices(n))) for part, n in zip(index, shape, strict=True)]
        return np.full(sizes, value, np.float32)

    return LazyTensor(shape, dtype, read)


def _pad_rows(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | LazyTensor:
    """The tensor, padded with rows of zeros to `shape`."""
    available = tensor.shape[0]
    if available >= shape[0]:
        return tensor

    def read(index: Index) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        rows = tensor[(slice(min(start, available), min(stop, available)), *index[1:])]
        return np.pad(rows, [(0, stop - start - len(rows))] + [(0, 0)] * (len(shape) - 1))

    return LazyTensor(shape, tensor.dtype, read)


def _initialise(key: str, shape: tuple[int, ...], seed: int, c: ModelConfig) -> LazyTensor:
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
