"""ChatML: a question, its history and its pictures as one prompt text, as the official `chat`."""

import itertools
from collections.abc import Sequence

import numpy as np

from neo_jax.data.tokenizer import IMAGE_CONTEXT, IMAGE_END, IMAGE_START, TURN_END, TURN_START
from neo_jax.errors import InputError

IMAGE_MARK = "<image>"


def chat_prompt(
    question: str,
    *,
    history: Sequence[tuple[str, str]] | None = None,
    system: str = "",
    num_images: int = 0,
) -> str:
    """The prompt, with an <image> mark for each picture.

    `<image>` and a line end are put in front of the question when there is a picture, no
    `history` (None; an empty list counts as one), and no mark.

        <|im_start|>user
        <image>
        What is this?<|im_end|>
        <|im_start|>assistant

    Raises:
      InputError: when the marks are not as many as the pictures, or something is not text.
    """
    pairs = [tuple(turn) if isinstance(turn, tuple | list) else turn for turn in history or ()]
    if not all(isinstance(turn, tuple) and len(turn) == 2 for turn in pairs):
        raise InputError("history: give (question, answer) pairs")
    for text in (question, system, *itertools.chain(*pairs)):
        if not isinstance(text, str):
            raise InputError(f"a prompt is made of texts, not of {text!r}")
    if history is None and num_images and IMAGE_MARK not in question:
        question = f"{IMAGE_MARK}\n{question}"
    prompt = f"{TURN_START}system\n{system}{TURN_END}\n" if system else ""
    for asked, answered in pairs:
        prompt += _turn("user", asked) + _turn("assistant", answered)
    prompt += _turn("user", question) + f"{TURN_START}assistant\n"
    marks = prompt.count(IMAGE_MARK)
    if marks != num_images:
        raise InputError(
            f"the prompt has {marks} {IMAGE_MARK} marks, but {num_images} images are given: "
            "put one mark where each image belongs"
        )
    return prompt


def expand_images(prompt: str, grid_hw: np.ndarray) -> str:
    """Puts `<img>`, a context token per visual token and `</img>` for each mark, in order.

    Args:
      prompt: with as many marks as there are grids.
      grid_hw: [n, 2] patch grids.
    """
    for rows, columns in np.asarray(grid_hw).reshape(-1, 2):
        visual = IMAGE_START + IMAGE_CONTEXT * (int(rows) * int(columns) // 4) + IMAGE_END
        prompt = prompt.replace(IMAGE_MARK, visual, 1)
    return prompt


def _turn(role: str, text: str) -> str:
    # The official template closes only turns that say something.
    return f"{TURN_START}{role}\n" + (f"{text}{TURN_END}\n" if text else "")
