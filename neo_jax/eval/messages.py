"""Prompt layout: where the images of a message, or the frames of a video, stand in the prompt.

The published scores depend on it, so line ends, spaces and order are those of the official wrappers
(`tests/golden/chat/evaluation_prompts.json`). The wording is in `prompts.py`.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from neo_jax.data.chat import IMAGE_MARK
from neo_jax.data.video import Video, frame_marks, video_header
from neo_jax.errors import InputError
from neo_jax.eval.tables.rows import Row

Message = Sequence[str | None]  # texts, and None for the next image
Layout = Callable[[Message], str]
Subtitle = tuple[float, float, str]  # start and end in seconds, text


def general(message: Message) -> str:
    """A single image goes first; several stay in their places, each followed by a line end."""
    if list(message).count(None) == 1:
        return f"{IMAGE_MARK}\n" + "\n".join(part for part in message if part is not None)
    return "".join(f"{IMAGE_MARK}\n" if part is None else part for part in message)


def spatial(message: Message) -> str:
    """A single image as in `general`; several go first, numbered, and leave their names in place.

    Image-1: <image>
    Image-2: <image>
    Is <Image-1> left of <Image-2>?
    """
    count = list(message).count(None)
    if count == 1:
        return general(message)
    names, text = _with_names(message)
    prompt = "".join(f"{name[1:-1]}: {IMAGE_MARK}\n" for name in names) + text
    return prompt.replace("".join(names), "") if names else prompt


def named(message: Message) -> str:
    """MUIRBench's layout: images first, numbered, and their names in place, even for one image."""
    names, text = _with_names(message)
    return "".join(f"{name}: {IMAGE_MARK}\n" for name in names) + text


def _with_names(message: Message) -> tuple[list[str], str]:
    """The names of the images, and the text with each name in its image's place."""
    names = [f"<Image-{number}>" for number in range(1, list(message).count(None) + 1)]
    rest = iter(names)
    return names, "".join(next(rest) if part is None else part for part in message)


def marks_to_parts(text: str, count: int, *, append_spare: bool = False) -> list[str | None]:
    """Splits text at its <image> marks into a message of up to `count` images; strips the texts.

    Args:
      append_spare: put an image after the last text too if one is left, as MUIRBench's code does.
    """
    texts = text.split(IMAGE_MARK)
    parts: list[str | None] = []
    for place, one in enumerate(texts):
        parts += [one.strip()] if one.strip() else []
        if place < count and (append_spare or place < len(texts) - 1):
            parts.append(None)
    return parts


@dataclasses.dataclass(frozen=True)
class Frames:
    """The prompt layout of a video: sampled frames, subtitles, then the question."""

    before: str = ""  # in front of the frames
    header: bool = True  # a line with the time range and the frame rate
    labels: str = "times"  # before each frame: "times", "numbers" or "none"
    subtitles: tuple[Subtitle, ...] = ()

    def __call__(self, video: Video, question: str) -> str:
        # As officially: the images that a question names are frames.
        question = re.sub(r"Image-(?=[1-9])", "Frame-", question)
        marks = frame_marks(video, self.labels)
        lines, placed = [], 0
        for start, end, text in self.subtitles:
            middle = (start + end) / 2
            while placed < len(marks) and video.times[placed] <= middle:
                lines.append(marks[placed])
                placed += 1
            if end - start < 1:
                start, end = middle - 0.5, middle + 0.5
            if any(start < time < end for time in video.times):
                lines.append(f"{text}\n")
        header = video_header(video) if self.header else ""
        return self.before + header + "".join([*lines, *marks[placed:], question])


def read_subtitles(path: Path, row: Row) -> tuple[Subtitle, ...]:
    """Reads a subtitle file of LongVideoBench; times count from the start of the video.

    Raises:
      InputError: if it cannot be read or has another form.
    """
    try:
        lines = json.loads(path.read_text())
        offset = float(row.get("starting_timestamp_for_subtitles", 0))
        return tuple(_subtitle(line, offset, float(row.get("duration", 0))) for line in lines)
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise InputError(f"{path}: not subtitles as LongVideoBench has them: {error}") from error


def _subtitle(line: dict, offset: float, duration: float) -> Subtitle:
    if "timestamp" in line:
        start, end = line["timestamp"]
        end = end if isinstance(end, float) else duration
        return start - offset, end - offset, line["text"]
    return _seconds(line["start"]) - offset, _seconds(line["end"]) - offset, line["line"]


def _seconds(stamp: str) -> float:
    hours, minutes, seconds = stamp.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
