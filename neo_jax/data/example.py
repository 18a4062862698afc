"""The arrays of one document, and a batch of several documents with a fixed shape."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from neo_jax.data.positions import block_order, thw_positions
from neo_jax.data.tokenizer import NeoTokenizer


@dataclasses.dataclass(frozen=True)
class Example:
    """One document, not padded. Fields are as in `batch.py`, without the batch dimension."""

    tokens: np.ndarray  # [L] int32
    thw: np.ndarray  # [L, 3] int32
    is_image: np.ndarray  # [L] bool
    patches: np.ndarray  # [P, C] uint8, or float32 if normalised; block order
    patch_hw: np.ndarray  # [P, 2] int32


def make_example(
    token_ids: Sequence[int],
    patches: np.ndarray,
    grid_hw: np.ndarray,
    tokenizer: NeoTokenizer,
) -> Example:
    """A document from token ids and row-major patches.

    Args:
      token_ids: [L] int, with the visual tokens in place.
      patches: [P, C] of all images, in order.
      grid_hw: [n, 2] patch grids.

    Raises:
      InputError: if tokens and grids do not match.
    """
    tokens = np.asarray(token_ids, np.int32)
    thw = thw_positions(tokens, grid_hw, tokenizer.image_start_id, tokenizer.image_context_id)
    order, patch_hw = block_order(grid_hw)
    return Example(tokens, thw, tokens == tokenizer.image_context_id, patches[order], patch_hw)


def collate(examples: Sequence[Example], length: int, num_patches: int) -> dict[str, np.ndarray]:
    """A batch with one example per row, padded to `length` tokens and `num_patches` patches."""

    def padded(name: str, size: int) -> np.ndarray:
        arrays = [getattr(example, name) for example in examples]
        out = np.zeros((len(arrays), size, *arrays[0].shape[1:]), arrays[0].dtype)
        for row, array in zip(out, arrays, strict=True):
            row[: len(array)] = array
        return out

    segments = np.zeros((len(examples), length), np.int32)
    for row, example in zip(segments, examples, strict=True):
        row[: len(example.tokens)] = 1
    tokens = {name: padded(name, length) for name in ("tokens", "thw", "is_image")}
    patches = {name: padded(name, num_patches) for name in ("patches", "patch_hw")}
    return {**tokens, "segments": segments, **patches}
