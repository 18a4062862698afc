"""What is asked and what is answered."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from neo_jax.data.image import ImageSource
from neo_jax.data.video import Video, VideoSource
from neo_jax.infer.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Request:
    """One question, with what it is about."""

    prompt: str = ""  # with an <image> mark where each image belongs, or none for one image
    images: Sequence[ImageSource] = ()  # paths, encoded bytes, Pillow images, [H, W, 3] uint8
    video: VideoSource | None = None  # a file, a folder of images, or a list of images
    history: Sequence[tuple[str, str]] | None = None  # earlier (question, answer) turns
    system: str = ""  # system prompt
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    min_pixels: int | None = None  # of each resized image; default: the checkpoint's
    max_pixels: int | None = None
    video_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of `load_video`
    # Makes the prompt of a video's frames and the question; with it, images may follow the
    # frames. Default: `data.video.video_prompt`.
    lay_out: Callable[[Video, str], str] | None = None
    num_upscaled: int = 0  # so many images have their sides doubled before they are resized


@dataclasses.dataclass(frozen=True)
class Result:
    """One answer."""

    text: str  # without the stop token or text, stripped
    token_ids: tuple[int, ...]  # with the stop token
    finish_reason: str  # "stop", "length", "repetition", "cancelled" or "error"
    usage: Mapping[str, int]  # prompt_tokens, cached_tokens (of the prompt), completion_tokens
    error: str | None = None  # what was wrong with the request, or has failed
