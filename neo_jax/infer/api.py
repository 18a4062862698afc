"""A loaded model: configuration, parameters and tokenizer, and what one asks of them."""

import contextlib
import dataclasses
import difflib
import functools
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from neo_jax.data.image import ImageSource
from neo_jax.data.tokenizer import NeoTokenizer
from neo_jax.data.video import VideoSource
from neo_jax.errors import InputError
from neo_jax.infer import analysis
from neo_jax.infer.buckets import padded_length
from neo_jax.infer.engine import Engine
from neo_jax.infer.handle import RequestHandle
from neo_jax.infer.prepare import Prepared, Preparer
from neo_jax.infer.request import Request, Result
from neo_jax.infer.result_stream import stream_results
from neo_jax.infer.sampling import Sampling
from neo_jax.model_config import ModelConfig
from neo_jax.sharding import MESH_AXES, make_mesh
from neo_jax.weights.load import load_params, side_directory


@dataclasses.dataclass(eq=False)
class Pipeline:
    """What `neo_jax.load` returns."""

    config: ModelConfig
    params: dict
    tokenizer: NeoTokenizer
    mesh: Mesh
    _engine: Engine | None = dataclasses.field(default=None, repr=False, compare=False)
    _options: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)
    _lock: threading.RLock = dataclasses.field(
        default_factory=threading.RLock, repr=False, compare=False
    )

    @functools.cached_property
    def _prepare(self) -> Preparer:
        return Preparer(self.config, self.tokenizer)

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
        example = analysis.document(self.config, self.tokenizer, token_ids, pixel_values, grid_hw)
        with jax.set_mesh(self.mesh):
            batch = analysis.padded(example, self.mesh)
            logits_blv = analysis.logits(self.config, self.params, batch)
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
        example = analysis.document(self.config, self.tokenizer, token_ids, pixel_values, grid_hw)
        with jax.set_mesh(self.mesh):
            batch = analysis.padded(example, self.mesh)
            states = analysis.hidden_states(self.config, self.params, batch)
        inputs, layers, final = map(np.asarray, states)
        length = len(token_ids)
        return inputs[0, :length], layers[:, 0, :length], final[0, :length]

    def embed_patches(self, pixel_values: np.ndarray, grid_hw: np.ndarray) -> np.ndarray:
        """Visual tokens of some images: [P, 768] float32, [n, 2] -> [P/4, D], in token order."""
        t = self.tokenizer
        token_ids = [
            number
            for rows, columns in np.asarray(grid_hw).reshape(-1, 2)
            for number in (t.image_start_id, *[t.image_context_id] * (int(rows * columns) // 4))
        ]
        example = analysis.document(self.config, self.tokenizer, token_ids, pixel_values, grid_hw)
        with jax.set_mesh(self.mesh):
            batch = analysis.padded(example, self.mesh)
            inputs_bld = analysis.inputs(self.config, self.params, batch)
        return np.asarray(inputs_bld)[0, : len(token_ids)][example.is_image]

    def chat(
        self,
        question: str,
        images: Sequence[ImageSource] | ImageSource | None = (),
        *,
        video: VideoSource | None = None,
        history: Sequence[tuple[str, str]] | None = None,
        system: str = "",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        video_options: Mapping[str, Any] | None = None,
        stream: bool = False,
        **sampling: Any,
    ) -> str | Iterator[str]:
        """Answers a question about images or a video.

        Args:
          question: with an `<image>` mark where each image belongs, or without any: then the
            one image goes in front. A video always goes in front.
          images: paths, encoded bytes, Pillow images or [H, W, 3] uint8 arrays; or one of them.
          video: a file, a folder of images or a list of images; `video_options` are the
            arguments of `data.video.load_video`, such as num_frames or fps.
          history: earlier (question, answer) turns; their marks take the first images.
          system: system prompt.
          min_pixels, max_pixels: area of each resized image; default: the checkpoint's.
          stream: yield the answer in pieces instead. Closing the iterator cancels the answer.
          **sampling: fields of `Sampling`: max_new_tokens, temperature (0: greedy), top_k, top_p,
            repetition_penalty, seed, stop and so on.

        Raises:
          InputError: for an unreadable image, marks that do not match the images, a setting
            out of range, or a prompt that with its answer exceeds the model's context.

        May be called from many threads at once, as `generate` and `serve`.
        """
        if images is None or isinstance(images, ImageSource):
            images = () if images is None else (images,)
        request = Request(
            prompt=question,
            images=images,
            video=video,
            history=history,
            system=system,
            sampling=_sampling(sampling),
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            video_options=video_options or {},
        )
        # Prepared here, so that its errors are raised before the first piece.
        prepared = self._prepare(request)
        needed = len(prepared.prefix_ids) + request.sampling.max_new_tokens
        handle = self._submit(request, prepared, needed)
        pieces = _pieces(handle)
        return pieces if stream else "".join(pieces)

    def generate(self, requests: Iterable[Request], **engine_options: Any) -> list[Result]:
        """Answers many requests together; results are in their order.

        Args:
          requests: see `Request`. One that is bad gives a `Result` with an `error`.
          **engine_options: of `Engine`: slots, max_length, kv_dtype and so on.
        """
        return [result for _, result in sorted(self.serve(requests, **engine_options))]

    def serve(
        self, requests: Iterable[Request], **engine_options: Any
    ) -> Iterator[tuple[int, Result]]:
        """As `generate`, but yields (number of the request, result) as they finish.

        Requests are taken from the iterable as they are needed, by a thread of its own. Closing the
        iterator cancels what is unfinished.
        """
        self.engine(**engine_options)  # so that their errors are raised now
        return self._serve(requests, engine_options)

    def _serve(
        self, requests: Iterable[Request], engine_options: dict
    ) -> Iterator[tuple[int, Result]]:
        with contextlib.ExitStack() as held:
            with self._lock:  # the engine may have been replaced, and stays from here on
                engine = self.engine(**engine_options)
                held.enter_context(engine.iterator())
            yield from stream_results(engine, requests)

    def engine(self, **options: Any) -> Engine:
        """An engine with these options (see `Engine`). The last one is kept, with its cache.

        Raises:
          InputError: when it does not fit, or while an engine with other options has work to do.
        """
        with self._lock:
            if self._engine is None or self._engine.is_closed or self._options != options:
                if self._engine is not None:
                    self._engine.retire()  # first, so that the memory of its pool is free
                    self._engine = None
                _use_compilation_cache()
                self._engine = Engine(
                    self.config, self.params, self.mesh, self.tokenizer, self._prepare, **options
                )
                self._options = options
            return self._engine

    def _submit(self, request: Request, prepared: Prepared, needed: int) -> RequestHandle:
        """Gives a request to the kept engine if it fits there, or else to a new one."""
        limit = self.config.max_position_embeddings
        if needed > limit:
            length, new = len(prepared.prefix_ids), request.sampling.max_new_tokens
            raise InputError(
                f"the prompt has {length} tokens; with max_new_tokens={new} that exceeds the "
                f"model's context of {limit}: lower max_pixels or max_new_tokens"
            )
        with self._lock:
            engine = self._engine
            if engine is None or engine.is_closed or engine.max_length < needed:
                engine = self.engine(max_length=min(padded_length(needed), limit))
            return engine.submit(request, lambda _: prepared)


def _pieces(handle: RequestHandle) -> Iterator[str]:
    """Text of one answer as it comes. A caller that goes away cancels it."""
    try:
        yield from handle
    finally:
        handle.cancel()


def load(
    path: str | Path,
    dtype: str = "bfloat16",
    mesh: Mesh | tuple[int, int, int] | None = None,
    weights: str | None = None,
) -> Pipeline:
    """Loads a model.

    Args:
      path: a directory as published (config.json, model*.safetensors, the tokenizer's files), or
        one that `convert.from_hf` or training wrote.
      dtype: "bfloat16" or "float32", of parameters and matrix products; norms, rotary angles,
        softmax and logits are float32 in both.
      mesh: sizes of (data, fsdp, tensor), or a Mesh from neo_jax.sharding; default: heads
        split over as many local devices as divide them.
      weights: "int8" keeps the large matrices in 8 bits, half the memory of bfloat16.

    Raises:
      InputError: naming the file, key or field that is missing or wrong.
    """
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype {dtype!r}: use 'float32' or 'bfloat16'")
    tokenizer = NeoTokenizer.from_directory(side_directory(path))  # before gigabytes are read
    if mesh is not None and not isinstance(mesh, Mesh):
        mesh = make_mesh(mesh)
    elif mesh is not None and (
        mesh.axis_names != MESH_AXES or set(mesh.axis_types) != {AxisType.Explicit}
    ):
        raise InputError(
            f"mesh {mesh}: give its sizes instead, such as (1, 1, 8), or a mesh of Explicit axes "
            f"{MESH_AXES}, as neo_jax.sharding.make_mesh makes"
        )
    config, params = load_params(path, dtype, mesh, weights)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the model "
            f"{config.vocab_size} rows: they do not belong together"
        )
    return Pipeline(config, params, tokenizer, jax.tree.leaves(params)[0].sharding.mesh)


def _sampling(fields: Mapping[str, Any]) -> Sampling:
    names = [field.name for field in dataclasses.fields(Sampling)]
    for name in fields:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f", did you mean {near[0]!r}" if near else f": use one of {', '.join(names)}"
            raise InputError(f"no setting {name!r}{hint}")
    return Sampling(**fields)


def _use_compilation_cache() -> None:
    """Keeps compiled programs on disk, unless the user chose a place for them."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "neo_jax"))
