"""A request to token ids and patches, on the host; equal images are worked on once."""

import collections
import dataclasses
import hashlib
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future

import numpy as np
from PIL import Image

from neo_jax.data.chat import chat_prompt, expand_images
from neo_jax.data.example import Example, make_example
from neo_jax.data.image import ImageSource, patchify, resized_pixels
from neo_jax.data.tokenizer import NeoTokenizer
from neo_jax.data.video import load_video, video_prompt
from neo_jax.errors import InputError
from neo_jax.infer.request import Request
from neo_jax.model_config import IMAGE_FACTOR, PATCH_CHANNELS, ModelConfig


@dataclasses.dataclass(frozen=True)
class PreparedImage:
    """A resized and cut image."""

    patches: np.ndarray  # [P, C] uint8, row-major
    grid_hw: np.ndarray  # [1, 2]
    digest: int  # of its content: images with equal patches have equal digests


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prompt as the engine takes it."""

    example: Example
    # [L] int64: the token, or for a visual token a number made of its image. Prompts whose
    # prefix ids agree on a prefix have the same keys and values there.
    prefix_ids: np.ndarray


class Preparer:
    """Turns requests into prompts; safe to use from several threads.

    Args:
      max_bytes: of the latest images, which are kept for requests that ask of them again.
    """

    def __init__(self, c: ModelConfig, tokenizer: NeoTokenizer, max_bytes: int = 256 << 20):
        self._config, self._tokenizer = c, tokenizer
        self._pictures = _Once(max_bytes)

    def __call__(self, request: Request) -> Prepared:
        """Raises InputError for anything wrong with the request."""
        low = self._config.min_pixels if request.min_pixels is None else request.min_pixels
        high = self._config.max_pixels if request.max_pixels is None else request.max_pixels
        images = [
            self._prepare_image(image, low, high, place < request.num_upscaled)
            for place, image in enumerate(request.images)
        ]
        question = request.prompt
        if request.video is not None:
            if request.images and request.lay_out is None:
                raise InputError("give images or a video, not both")
            video = load_video(request.video, **request.video_options)
            question = (request.lay_out or video_prompt)(video, request.prompt)
            images = [*(_cut(np.asarray(frame)) for frame in video.frames), *images]
        prompt = chat_prompt(
            question, history=request.history, system=request.system, num_images=len(images)
        )
        return self._prompt(prompt, images)

    def _prepare_image(
        self, image: ImageSource, low: int, high: int, upscale: bool
    ) -> PreparedImage:
        context = self._config.max_position_embeddings
        if low > context * IMAGE_FACTOR**2:  # before gigabytes are made of it
            raise InputError(
                f"min_pixels {low} gives {low // IMAGE_FACTOR**2} visual tokens, more than the "
                f"context of {context}"
            )

        def make() -> PreparedImage:
            return _cut(resized_pixels(image, low, high, upscale=upscale))

        key = _source_key(image)
        return make() if key is None else self._pictures((key, low, high, upscale), make)

    def _prompt(self, prompt: str, images: Sequence[PreparedImage]) -> Prepared:
        nothing = np.zeros((0, PATCH_CHANNELS), np.uint8), np.zeros((0, 2), np.int32)
        patches = np.concatenate([nothing[0], *(image.patches for image in images)])
        grid_hw = np.concatenate([nothing[1], *(image.grid_hw for image in images)])
        token_ids = self._tokenizer.encode(expand_images(prompt, grid_hw))
        example = make_example(token_ids, patches, grid_hw, self._tokenizer)
        prefix_ids = example.tokens.astype(np.int64)
        counts = grid_hw.prod(axis=1) // 4
        visual = [
            image.digest ^ np.arange(count) for image, count in zip(images, counts, strict=True)
        ]
        if visual:
            prefix_ids[example.is_image] = np.concatenate(visual)
        return Prepared(example, prefix_ids)


class _Once:
    """The latest images by key, within a bound of bytes.

    Who asks for one that is being made waits for it.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes, self._bytes, self._lock = max_bytes, 0, threading.Lock()
        self._making: dict[Hashable, Future[PreparedImage]] = {}
        self._made: collections.OrderedDict[Hashable, PreparedImage] = collections.OrderedDict()

    def __call__(self, key: Hashable, make: Callable[[], PreparedImage]) -> PreparedImage:
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
                return self._made[key]
            future = self._making.get(key)
            is_mine = future is None
            if is_mine:
                future = self._making[key] = Future()
        if is_mine:
            self._make(key, make, future)
        return future.result()

    def _make(self, key: Hashable, make: Callable[[], PreparedImage], future: Future) -> None:
        try:
            image = make()
        except BaseException as error:
            with self._lock:
                del self._making[key]
            future.set_exception(error)
            return
        with self._lock:
            del self._making[key]
            self._made[key] = image
            self._bytes += image.patches.nbytes
            while self._bytes > self._max_bytes:
                _, oldest = self._made.popitem(last=False)
                self._bytes -= oldest.patches.nbytes
        future.set_result(image)


def _cut(pixels: np.ndarray) -> PreparedImage:
    patches, grid_hw = patchify(pixels)
    digest = hashlib.blake2b(patches.tobytes() + grid_hw.tobytes(), digest_size=8).digest()
    # Negative, so that it is never a token id.
    return PreparedImage(patches, grid_hw, -(int.from_bytes(digest) >> 2) - 2**61)


def _source_key(image: ImageSource):
    """What stays equal while a source's pixels do; None if that is not known cheaply."""
    if isinstance(image, bytes):
        return "bytes", hashlib.blake2b(image, digest_size=16).digest()
    if isinstance(image, np.ndarray):
        return "array", image.shape, hashlib.blake2b(image.tobytes(), digest_size=16).digest()
    if isinstance(image, Image.Image):
        return None
    try:
        status = os.stat(image)
    except (OSError, ValueError, TypeError):
        return None  # opening it says what is wrong
    return "file", os.path.abspath(image), status.st_mtime_ns, status.st_size
