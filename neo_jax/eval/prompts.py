"""Prompt templates: the question text of each benchmark, from a row.

The wording is that of the official wrappers. For images a template returns a `Message`, in which
None marks an image; for videos it returns the text after the frames.
"""

import re

from neo_jax.data.chat import IMAGE_MARK
from neo_jax.eval.messages import Message, marks_to_parts
from neo_jax.eval.tables.rows import Row, columns_of_options, listed, options, text

BRIEFLY = "Answer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."
_BEST = "Give me the answer letter directly. The best answer is:"
_MMMU_CHOICE = (
    "Answer the preceding multiple choice question. The last line of your response should follow "
    "this format: 'Answer: \\boxed LETTER' (without quotes), where LETTER is one of the options. "
    "If you are uncertain or the problem is too complex, make a reasoned guess based on the "
    "information provided. Avoid repeating steps indefinitely—provide your best guess even if "
    "unsure. Think step by step logically, considering all relevant information before answering.\n"
)
_MMMU_OPEN = (
    "Your output should be divided into two parts: First, reason about the correct answer. Then "
    "write the answer in the following format where X is only the answer and nothing else: "
    '"ANSWER: X"'
)


def _lines(choices: dict[str, str], form: str = "\n{}. {}") -> str:
    return "".join(form.format(letter, choice) for letter, choice in choices.items())


def _then_images(question: str, count: int) -> Message:
    return [question, *[None] * count]


def choice(row: Row, count: int) -> Message:
    """Multiple choice: hint, question, lettered options, instruction; then the images."""
    question = text(row, "question").replace(IMAGE_MARK, "").strip()
    if "hint" in row:
        question = f"{row['hint']}\n{question}"
    choices = options(row)
    question += _lines(choices)
    is_chinese = re.search("[一-鿿]", question) is not None
    if choices:
        end = "请直接回答选项字母。" if is_chinese else _LETTER
    else:
        end = "请直接回答问题。" if is_chinese else "Answer the question directly."
    return _then_images(f"{question}\n{end}", count)


def mmmu(row: Row, count: int) -> Message:
    """MMMU: multiple choice or open, with its own instructions to reason."""
    is_choice = row.get("question_type", "multiple-choice") == "multiple-choice"
    opening = _MMMU_CHOICE if is_choice else _MMMU_OPEN
    return _then_images(f"{opening}\n{text(row, 'question')}{_lines(options(row))}", count)


def plain(row: Row, count: int) -> Message:
    """The question alone."""
    return _then_images(text(row, "question"), count)


def briefly(row: Row, count: int) -> Message:
    """The question, and an instruction to answer with a word or phrase."""
    return _then_images(f"{text(row, 'question')}\n{BRIEFLY}", count)


def one_word(row: Row, count: int) -> Message:
    """MME: as `briefly`, in one line."""
    return _then_images(f"{text(row, 'question')} {BRIEFLY}", count)


def yes_or_no(row: Row, count: int) -> Message:
    """HallusionBench: the question, to be answered with yes or no."""
    return _then_images(f"{text(row, 'question')} Please answer yes or no. {BRIEFLY}", count)


def view_spatial(row: Row, count: int) -> Message:
    choices = row.get("candidates") or "\n".join(f"{k}. {v}" for k, v in options(row).items())
    return [
        *[None] * count,
        f"Question: {text(row, 'question')}\nChoices: {choices}\n"
        "Reply only to the corresponding option.\nAnswer:",
    ]


def mmsi(row: Row, count: int) -> Message:
    hint = f"Hint: {row['hint']}\n" if "hint" in row else ""
    choices = columns_of_options(row)
    listed_options = "Options: " + _lines(choices, "{}: {}, ") if choices else ""
    return [
        *[None] * count,
        f"{hint}{text(row, 'question')}\n{listed_options}\n{_LETTER} "
        "Enclose the option's letter within ``.",
    ]


def site(row: Row, count: int) -> Message:
    choices = "\n".join(f"{letter}: {choice}" for letter, choice in options(row).items())
    question = text(row, "question")
    opening = "" if IMAGE_MARK in question + choices else IMAGE_MARK * count + "\n"
    asked = f"{opening}Question: {question}\nOptions:\n{choices}\n{_BEST}"
    return marks_to_parts(asked, count)


def muirbench(row: Row, count: int) -> Message:
    choices = _lines(options(row), "({}) {}\n")
    asked = (
        f"Question: {text(row, 'question')}\nChoices: \n{choices}\n"
        "Hint: Please provide the correct option letter, such as A, B, C, D, directly.\nAnswer:"
    )
    return marks_to_parts(asked, count, append_spare=True)


def omnispatial(row: Row, count: int) -> Message:
    """OmniSpatial, direct form; prefix=@FILE puts the benchmark's long instructions in front."""
    asked = f"{text(row, 'question')}{_lines(options(row))}"
    end = "\nAnswer directly with the option letter from the given choices. "
    return [*[None] * count, asked + end]


# Prompts of videos: the text after the frames.


def vsi(row: Row) -> str:
    asked = f"These are frames of a video.\n{text(row, 'question')}\n"
    if "candidates" in row:
        return asked + "\n".join([*listed(row["candidates"]), _LETTER])
    return asked + "Answer briefly and directly in one float number."


def site_video(row: Row) -> str:
    choices = "\n".join(f"{letter}: {choice}" for letter, choice in options(row).items())
    return (
        "Select the best answer to the following multiple-choice question based on the video. "
        "Respond with only the letter of the correct option.\n"
        f"Question: {text(row, 'question')}\nOptions:\n{choices}\n{_BEST}"
    )


def video_mme(row: Row) -> str:
    choices = "\n".join(listed(row.get("candidates", [])))
    # The space is what the official wrapper leaves of "Answer: ".
    return (
        "\nThese are the frames of a video. Select the best answer to the following "
        "multiple-choice question based on the video. Respond with only the letter (A, B, C, or D) "
        f"of the correct option.\nQuestion: {text(row, 'question')}\n{choices} \n{_LETTER}"
    )


WATCH = (
    "Carefully watch this video and pay attention to every detail. Based on your observations, "
    "select the best option that accurately addresses the question."
)
WATCH_EVENTS = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail "
    "and movement of objects, and the action and pose of persons. Based on your observations, "
    "select the best option that accurately addresses the question.\n"
)


def best_option(row: Row) -> str:
    """MVBench and MLVU."""
    choices = _lines(options(row), "({}) {}\n")
    asked = f"Question: {text(row, 'question')}\nOptions:\n{choices}".rstrip()
    return f"{asked}\nOnly give the best option."


def lvbench(row: Row) -> str:
    return f"{text(row, 'question')}\nAnswer the question with the option letter."


def long_video(row: Row) -> str:
    return f"{text(row, 'question')}{_lines(options(row))}\n{_LETTER}"


_AT_THE_END = "The image for this question is at the end of the video."
_TO_CHOOSE = (
    f"answer the following multi-choice question. {_AT_THE_END} Please provide only the single "
    "option letter (e.g., A, B, C, D, etc.)\n"
)
_TO_ANSWER = f"answer the following open-ended question. {_AT_THE_END}\n"


def video_mmmu(row: Row) -> str:
    """VideoMMMU; an Adaptation question has an image, in the place of "<image 1>" or at the end."""
    question, choices = text(row, "question"), listed(row.get("options", []))
    is_choice = row.get("question_type") == "multiple-choice"
    lines = _lines({chr(ord("A") + place): one for place, one in enumerate(choices)})
    if all(one.startswith(f"{chr(ord('A') + place)}.") for place, one in enumerate(choices)):
        lines = "".join(f"\n{one}" for one in choices)
    if row.get("category") == "Adaptation":
        opening = (
            "You should watch and learn the video content. Then apply what you learned to "
            + (_TO_CHOOSE if is_choice else _TO_ANSWER)
        )
        before, mark, after = f"{opening}{question}{lines if is_choice else ''}".partition(
            "<image 1>"
        )
        image = f"{IMAGE_MARK}\n"
        return before + image + after if mark else before + image
    end = "\nPlease ignore the Quiz question in last frame of the video."
    return f"{question}{_TO_CHOOSE + lines if is_choice else _TO_ANSWER}{end}"
