"""A loaded model: configuration, parameters and tokenizer, and what one asks of them."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from neo_jax.config import PATCH_CHANNELS, ModelConfig
from neo_jax.data.chat import chat_prompt, expand_images
from neo_jax.data.example import Example, make_example
from neo_jax.data.image import ImageSource, patchify, resized_pixels
from neo_jax.data.tokenizer import NeoTokenizer
from neo_jax.errors import InputError
from neo_jax.infer import generate
from neo_jax.model.neo import bind
from neo_jax.sharding import make_mesh
from neo_jax.weights.load import load_params, side_directory


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What `neo_jax.load` returns."""

    config: ModelConfig
    params: dict
    tokenizer: NeoTokenizer
    mesh: Mesh

    def logits(
        self,
        token_ids: Sequence[int],
        pixel_values: np.ndarray | None = None,
        grid_hw: np.ndarray | None = None,
    ) -> np.ndarray:
        """Logits of every position of one document.

        Args:
          token_ids: [L] int, with the visual tokens in place.
          pixel_values: [P, 768] float32, normalised row-major patches of all images.
          grid_hw: [n, 2] patch grids of the images.

        Returns:
          [L, V] float32.

        Raises:
          InputError: when the visual tokens and the images do not match.
        """
        example = self._example(token_ids, pixel_values, grid_hw)
        with jax.set_mesh(self.mesh):
            batch = generate.padded_batch(example, self.mesh)
            logits_blv = _logits(self.config, self.params, batch)
        return np.asarray(logits_blv)[0, : len(token_ids)]

    def hidden_states(
        self,
        token_ids: Sequence[int],
        pixel_values: np.ndarray | None = None,
        grid_hw: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What runs through the model, for analysis; arguments as in `logits`.

        Returns:
          the decoder's input [L, D], the residual stream after each layer [layers, L, D], and
          the final norm's output [L, D].
        """
        example = self._example(token_ids, pixel_values, grid_hw)
        with jax.set_mesh(self.mesh):
            batch = generate.padded_batch(example, self.mesh)
            states = _hidden_states(self.config, self.params, batch)
        inputs, layers, final = map(np.asarray, states)
        length = len(token_ids)
        return inputs[0, :length], layers[:, 0, :length], final[0, :length]

    def embed_patches(self, pixel_values: np.ndarray, grid_hw: np.ndarray) -> np.ndarray:
        """Visual tokens of some images: [P, 768] float32, [n, 2] -> [P/4, D], in token order."""
        t = self.tokenizer
        token_ids = np.concatenate(
            [
                [t.image_start_id, *[t.image_context_id] * (int(rows) * int(columns) // 4)]
                for rows, columns in np.asarray(grid_hw).reshape(-1, 2)
            ]
        )
        example = self._example(token_ids, pixel_values, grid_hw)
        with jax.set_mesh(self.mesh):
            batch = generate.padded_batch(example, self.mesh)
            inputs_bld = _inputs(self.config, self.params, batch)
        return np.asarray(inputs_bld)[0, : len(token_ids)][example.is_image]

    def chat(
        self,
        question: str,
        images: Sequence[ImageSource] = (),
        *,
        history: Sequence[tuple[str, str]] | None = None,
        system: str = "",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_new_tokens: int = 512,
        stream: bool = False,
    ) -> str | Iterator[str]:
        """Answers a question about pictures, greedily.

        Args:
          question: with an `<image>` mark where each picture belongs, or without any: then the
            one picture goes in front.
          images: paths, encoded bytes, Pillow images or [H, W, 3] uint8 arrays.
          history: earlier (question, answer) turns; their marks take the first images.
          system: system prompt.
          min_pixels, max_pixels: area of each resized image; default: the checkpoint's.
          max_new_tokens: the answer is cut there.
          stream: yield the answer in pieces instead.

        Raises:
          InputError: for an unreadable picture, marks that do not match the pictures, or a
            prompt that with its answer exceeds the model's context.
        """
        prompt = chat_prompt(question, history=history, system=system, num_images=len(images))
        example = self._prompt_example(prompt, images, min_pixels, max_pixels)
        self._check_context(len(example.tokens), max_new_tokens)
        pieces = self._stream(example, max_new_tokens)
        return pieces if stream else "".join(pieces)

    def _prompt_example(self, prompt, images, min_pixels, max_pixels) -> Example:
        low = self.config.min_pixels if min_pixels is None else min_pixels
        high = self.config.max_pixels if max_pixels is None else max_pixels
        cut = [patchify(resized_pixels(image, low, high)) for image in images]
        patches = np.concatenate([p for p, _ in cut]) if cut else _no_patches()
        grid_hw = np.concatenate([grid for _, grid in cut]) if cut else np.zeros((0, 2), np.int32)
        token_ids = self.tokenizer.encode(expand_images(prompt, grid_hw))
        return make_example(token_ids, patches, grid_hw, self.tokenizer)

    def _stream(self, example: Example, max_new_tokens: int) -> Iterator[str]:
        """Text pieces of the answer, whose join is the answer, stripped as officially."""
        stop, ids, said = self.tokenizer.turn_end_id, [], ""
        tokens = generate.greedy(self.config, self.params, self.mesh, example, max_new_tokens, stop)
        for token, _ in tokens:
            if token != stop:
                ids.append(token)
            text = self.tokenizer.decode(ids).lstrip()
            # A last character may still be incomplete, and last spaces may be the answer's end.
            ready = text.rstrip().rstrip("\N{REPLACEMENT CHARACTER}").rstrip()
            if len(ready) > len(said) and ready.startswith(said):
                yield ready[len(said) :]
                said = ready
        rest = self.tokenizer.decode(ids).strip()[len(said) :]
        if rest:
            yield rest

    def _check_context(self, prompt_length: int, max_new_tokens: int) -> None:
        limit = self.config.max_position_embeddings
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}: ask for 1 or more")
        if prompt_length + max_new_tokens > limit:
            raise InputError(
                f"the prompt has {prompt_length} tokens; with max_new_tokens={max_new_tokens} that "
                f"exceeds the model's context of {limit}: lower max_pixels or max_new_tokens"
            )

    def _example(self, token_ids, pixel_values, grid_hw) -> Example:
        if (pixel_values is None) != (grid_hw is None):
            raise InputError("give pixel_values and grid_hw both, or neither")
        patches = _no_patches().astype(np.float32) if pixel_values is None else pixel_values
        grid_hw = np.zeros((0, 2), np.int32) if grid_hw is None else np.asarray(grid_hw)
        wanted = (int(grid_hw.prod(axis=1).sum()), PATCH_CHANNELS)
        if np.shape(patches) != wanted:
            raise InputError(f"pixel_values is {np.shape(patches)}, grid_hw asks for {wanted}")
        token_ids = np.asarray(token_ids)
        if token_ids.size and not 0 <= token_ids.min() <= token_ids.max() < self.config.vocab_size:
            raise InputError(f"token ids must lie in 0..{self.config.vocab_size - 1}")
        self._check_context(len(token_ids), 1)
        return make_example(token_ids, np.asarray(patches), grid_hw, self.tokenizer)


def load(
    path: str | Path, dtype: str = "bfloat16", mesh: Mesh | tuple[int, int, int] | None = None
) -> Pipeline:
    """Loads a model.

    Args:
      path: a directory as published (config.json, model*.safetensors, the tokenizer's files), or
        one that `convert.from_hf` or training wrote.
      dtype: "bfloat16" or "float32", of parameters and matrix products; norms, rotary angles,
        softmax and logits are float32 in both.
      mesh: a jax Mesh with axes (data, fsdp, tensor), or its sizes; default: heads split over
        as many local devices as divide them.

    Raises:
      InputError: naming the file, key or field that is missing or wrong.
    """
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype {dtype!r}: use 'float32' or 'bfloat16'")
    tokenizer = NeoTokenizer.from_directory(side_directory(path))  # before gigabytes are read
    if mesh is not None and not isinstance(mesh, Mesh):
        mesh = make_mesh(mesh)
    config, params = load_params(path, dtype, mesh)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the model "
            f"{config.vocab_size} rows: they do not belong together"
        )
    return Pipeline(config, params, tokenizer, jax.tree.leaves(params)[0].sharding.mesh)


@functools.partial(jax.jit, static_argnums=0)
def _logits(c: ModelConfig, params: dict, batch: dict) -> jax.Array:
    return bind(c, params)(batch)


@functools.partial(jax.jit, static_argnums=0)
def _inputs(c: ModelConfig, params: dict, batch: dict) -> jax.Array:
    return bind(c, params).inputs(batch)


@functools.partial(jax.jit, static_argnums=0)
def _hidden_states(c: ModelConfig, params: dict, batch: dict) -> tuple[jax.Array, ...]:
    return bind(c, params).hidden_states(batch)


def _no_patches() -> np.ndarray:
    return np.zeros((0, PATCH_CHANNELS), np.uint8)
