"""ChatML: a question, its history and its images as one prompt, as the official `chat` does."""

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
    """The prompt, with an <image> mark for each image.

    If there are images but no mark in the question, and `history` is None (not merely empty), one
    `<image>` and a line end go in front of the question.

        <|im_start|>user
        <image>
        What is this?<|im_end|>
        <|im_start|>assistant

    Raises:
      InputError: if the numbers of marks and images differ, or a part is not text.
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
    """Replaces each mark with `<img>`, a context token per visual token, and `</img>`.

    Args:
      prompt: has a mark for each grid, in the same order.
      grid_hw: [n, 2] patch grids.
    """
    for rows, columns in np.asarray(grid_hw).reshape(-1, 2):
        visual = IMAGE_START + IMAGE_CONTEXT * (int(rows) * int(columns) // 4) + IMAGE_END
        prompt = prompt.replace(IMAGE_MARK, visual, 1)
    return prompt


def _turn(role: str, text: str) -> str:
    # As the official template: a turn without text is not closed.
    return f"{TURN_START}{role}\n" + (f"{text}{TURN_END}\n" if text else "")
