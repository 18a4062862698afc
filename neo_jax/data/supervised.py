"""From a training record to one document: tokens, next-token targets, loss weights, patches.

A record has the form of LLaVA and the official training kit:

    {"image": "a.jpg",                     or "images": [...], or "video": a file, folder or list
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                       {"from": "gpt", "value": "A boat."}]}

Only the assistant's turns have a loss: their text, <|im_end|> and the newline after it. The parts
of a turn are tokenised separately, as the official code does.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from neo_jax.data.chat import IMAGE_MARK, expand_images
from neo_jax.data.example import make_example
from neo_jax.data.image import open_rgb, patchify, smart_resize
from neo_jax.data.tokenizer import TURN_END, TURN_START, NeoTokenizer
from neo_jax.data.video import load_video, video_prompt
from neo_jax.errors import InputError
from neo_jax.model_config import IMAGE_FACTOR, PATCH_CHANNELS, PATCH_SIZE

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}  # turns of others are left out
VIDEO_MARK = "<video>"
TOKEN_PIXELS = IMAGE_FACTOR**2  # of one visual token
WEIGHTS = {"square": lambda n: n**-0.5, "token": lambda n: 1.0, "sample": lambda n: 1 / n}


class TooLong(InputError):
    """A good record that has more tokens or patches than a row."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of a document, and how its tokens are weighted."""

    length: int  # tokens
    num_patches: int
    min_pixels: int = 65536  # of each image after resizing
    max_pixels: int = 16777216  # of one image; n > 1 images get max(2 * max_pixels // n, min) each
    max_frames: int = 128  # of a video
    weights: str = "square"  # of each of n supervised tokens, see WEIGHTS
    too_long: str = "drop"  # or "shrink": resize images until the document fits

    def __post_init__(self):
        if self.weights not in WEIGHTS or self.too_long not in ("drop", "shrink"):
            raise InputError(
                f"weights {self.weights!r}, too_long {self.too_long!r}: use one of "
                f"{', '.join(WEIGHTS)}, and drop or shrink"
            )


@dataclasses.dataclass(frozen=True)
class _Turn:
    role: str
    text: str
    has_loss: bool  # its tokens are targets


def supervised_example(
    record: Mapping, tokenizer: NeoTokenizer, limits: Limits, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """The document of a record: arrays as in `batch.py`, without the batch dimension.

    Args:
      record: as above; an image is a path, encoded bytes, a Pillow image or an array.
      rng: samples the frames per second of a video, from U(1, min(4, its frame rate)).

    Raises:
      TooLong: if the document does not fit.
      InputError: for any other problem of the record.
    """
    turns, images = _turns(record), _listed(record)
    if record.get("video") is not None:
        if images:
            raise InputError("has images and a video: give one of them")
        turns, images = _with_video(turns, record["video"], limits, rng)
    turns = _with_image_mark(turns, len(images))
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if marks != len(images):
        raise InputError(f"has {marks} {IMAGE_MARK} marks for {len(images)} images")
    # Training drops alpha; only the evaluation composites images on white.
    images = [open_rgb(image, flatten=False) for image in images]
    high = limits.max_pixels
    if len(images) > 1:
        high = max(2 * high // len(images), limits.min_pixels)
    grid_hw = _grids(images, limits.min_pixels, high)
    tokens, has_loss = _tokenised(turns, grid_hw, tokenizer)
    if not _fits(tokens, grid_hw, limits) and limits.too_long == "shrink" and images:
        text = len(tokens) - int(grid_hw.prod(axis=1).sum()) // 4
        room = min(limits.length - text, limits.num_patches // 4) // len(images)
        high = max(room, 1) * TOKEN_PIXELS
        grid_hw = _grids(images, min(limits.min_pixels, high), high)
        tokens, has_loss = _tokenised(turns, grid_hw, tokenizer)
    if not _fits(tokens, grid_hw, limits):
        raise TooLong(
            f"has {len(tokens)} tokens and {grid_hw.prod(axis=1).sum()} patches; a row has "
            f"{limits.length} and {limits.num_patches}"
        )
    patches = [np.zeros((0, PATCH_CHANNELS), np.uint8)]
    for image, (rows, columns) in zip(images, grid_hw, strict=True):
        size = (int(columns) * PATCH_SIZE, int(rows) * PATCH_SIZE)
        patches.append(patchify(np.asarray(image.resize(size)))[0])
    example = make_example(tokens, np.concatenate(patches), grid_hw, tokenizer)
    return vars(example) | _targets(example.tokens, has_loss, limits.weights)


def _turns(record: Mapping) -> list[_Turn]:
    turns = record.get("conversations")
    if not isinstance(turns, list | tuple) or not turns:
        raise InputError("has no list of conversations")
    found = []
    for turn in turns:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise InputError('conversations: each turn is {"from": ..., "value": a text}')
        role = ROLES.get(turn.get("from"))
        if role:
            has_loss = role == "assistant" and not turn.get("is_input", False)
            found.append(_Turn(role, turn["value"], has_loss))
    if not any(turn.has_loss for turn in found):
        raise InputError("has no turn of gpt, so nothing to learn")
    return found


def _listed(record: Mapping) -> list:
    """The record's images: `image`, or else `images`; each may be one image or a list."""
    for name in ("image", "images"):
        if (found := record.get(name)) is not None:
            return list(found) if isinstance(found, list | tuple) else [found]
    return []


def _with_image_mark(turns: Sequence[_Turn], num_images: int) -> list[_Turn]:
    """The turns with the mark of a single image, which is optional, before the first question."""
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if num_images != 1 or first is None or any(IMAGE_MARK in turn.text for turn in turns):
        return list(turns)
    asked = dataclasses.replace(turns[first], text=f"{IMAGE_MARK}\n{turns[first].text}")
    return [*turns[:first], asked, *turns[first + 1 :]]


def _with_video(
    turns: Sequence[_Turn], source, limits: Limits, rng: np.random.Generator
) -> tuple[list[_Turn], list[Image.Image]]:
    """The video's frames, and the turns with the frames' marks and times before the question."""
    place = rng.random()
    video = load_video(
        source,
        fps=lambda rate: 1 + place * (max(1.0, min(4.0, rate)) - 1),
        max_frames=limits.max_frames,
        min_pixels=limits.min_pixels,
        max_pixels=limits.max_pixels,
        total_pixels=2 * limits.max_pixels,
    )
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise InputError("has a video, but no turn of human")
    text = turns[first].text
    for mark in (VIDEO_MARK, IMAGE_MARK):
        text = text.replace(f"{mark}\n", "", 1) if f"{mark}\n" in text else text.replace(mark, "")
    asked = dataclasses.replace(turns[first], text=video_prompt(video, text))
    return [*turns[:first], asked, *turns[first + 1 :]], list(video.frames)


def _grids(images: Sequence[Image.Image], low: int, high: int) -> np.ndarray:
    sizes = [smart_resize(p.height, p.width, IMAGE_FACTOR, low, high) for p in images]
    return np.array(sizes, np.int32).reshape(-1, 2) // PATCH_SIZE


def _fits(tokens: Sequence[int], grid_hw: np.ndarray, limits: Limits) -> bool:
    return len(tokens) <= limits.length and grid_hw.prod(axis=1).sum() <= limits.num_patches


def _tokenised(
    turns: Sequence[_Turn], grid_hw: np.ndarray, tokenizer: NeoTokenizer
) -> tuple[list[int], list[bool]]:
    """Token ids of the conversation, and for each whether it has a loss."""
    tokens, has_loss, used = [], [], 0
    for turn in turns:
        count = turn.text.count(IMAGE_MARK)
        text = expand_images(turn.text, grid_hw[used : used + count]) + f"{TURN_END}\n"
        used += count
        opening = f"{TURN_START}{turn.role}\n"
        pieces = [(opening, False), (text, True)] if turn.has_loss else [(opening + text, False)]
        for piece, is_target in pieces:
            ids = tokenizer.encode(piece)
            tokens += ids
            has_loss += [is_target] * len(ids)
    return tokens, has_loss


def _targets(tokens: np.ndarray, has_loss: Sequence[bool], weights: str) -> dict[str, np.ndarray]:
    """Targets and weights, shifted by one: the target of a token is the next token."""
    is_weighted = np.append(np.array(has_loss[1:], bool), False)  # the last token predicts nothing
    weight = np.float32(WEIGHTS[weights](sum(has_loss)))
    return {
        "targets": np.append(tokens[1:], 0).astype(np.int32),
        "weights": np.where(is_weighted, weight, np.float32(0)),
    }
