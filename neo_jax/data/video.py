"""From a video to frames and a prompt: choose frames, decode, resize, and write their times.

Follows the official evaluation code (`tests/golden/chat`). Only video files need PyAV, the extra
`[video]`.
"""

import bisect
import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from neo_jax.data.chat import IMAGE_MARK
from neo_jax.data.image import ImageSource, resized_pixels
from neo_jax.errors import InputError

VideoSource = str | os.PathLike | Sequence[ImageSource]

MIN_PIXELS, MAX_PIXELS = 4096, 230400  # of a frame, in the official evaluation of videos
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LABELS = {"times": "[{time}]:", "numbers": "Frame-{number}: ", "none": ""}


@dataclasses.dataclass(frozen=True)
class Video:
    """The chosen frames of a video."""

    frames: tuple[Image.Image, ...]  # RGB, already resized: cut them with `patchify`
    times: np.ndarray  # [n] float64, seconds: frame number / frame rate
    fps: float  # chosen frames per second
    duration: float  # of all the video, seconds


def evenly(total: int, count: int, spacing: str = "inside") -> np.ndarray:
    """[count] int: evenly spaced frame numbers below `total`. 4 of 10, by `spacing`:

    inside   2 4 6 8  away from both ends, as most benchmarks do
    centres  1 3 5 8  near the centres of equal parts, as MVBench does
    ends     0 3 6 9  from the first to the last, as the spatial benchmarks do
    """
    if spacing == "inside":
        return (np.arange(1, count + 1) * (total / (count + 1))).astype(int)
    if spacing == "centres":
        part = (total - 1) / count
        return (part / 2 + np.round(part * np.arange(count))).astype(int)
    if spacing == "ends":
        return np.linspace(0, total - 1, count, dtype=int)
    raise InputError(f"spacing {spacing!r}: use inside, centres or ends")


def at_rate(total: int, rate: float, fps: float, max_frames: int | None = None) -> np.ndarray:
    """Every (rate / fps)-th of `total` frames, none twice; none if shorter than 1 / fps seconds."""
    count = total if fps >= rate else int(total / rate * fps)
    step = max(rate / fps, 1)
    if max_frames is not None and count > max_frames:
        # As the official code: spaced as `inside`, but from frame 0.
        count, step = max_frames, total / (max_frames + 1)
    return (np.arange(count) * step).astype(int)


def choose_frames(
    total: int,
    rate: float,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    max_frames: int = 128,
    spacing: str = "inside",
) -> np.ndarray:
    """[n] int, ascending: the chosen ones of `total` frames, at least one.

    Chooses `num_frames` with `evenly` (some twice, if there are too few), or else `fps` (default 1)
    per second with `at_rate`, and at most `max_frames`. `rate` is frames per second of the video.
    """
    if num_frames is not None and fps is not None:
        raise InputError("give num_frames or fps, not both")
    if max_frames < 1 or (num_frames is not None and not 1 <= num_frames <= max_frames):
        raise InputError(f"num_frames {num_frames}, max_frames {max_frames}: need 1 <= num <= max")
    if num_frames is not None:
        return evenly(total, num_frames, spacing)
    fps = 1.0 if fps is None else fps
    if not 0 < fps < math.inf:
        raise InputError(f"fps is {fps}: it must be above 0")
    chosen = at_rate(total, rate, fps, max_frames)
    return chosen if len(chosen) else np.zeros(1, int)


def span_frames(total: int, rate: float, span: tuple[float, float] | None) -> tuple[int, int]:
    """The first and last frame of `span`, (start, end) in seconds; None: of all the video."""
    start, end = span or (0, math.inf)
    first, last = max(0, round(start * rate)), round(min(end * rate, total - 1))
    if first > last:
        raise InputError(f"span {span} holds no frame: the video has {total / rate:.2f} seconds")
    return first, last


def frame_limits(
    count: int, min_pixels: int, max_pixels: int, total_pixels: int | None = None
) -> tuple[int, int]:
    """(min, max) pixels of a frame. A total is shared evenly by frames, each at least min."""
    if not 0 < min_pixels <= max_pixels:
        raise InputError(f"min_pixels {min_pixels} must be 1 to max_pixels {max_pixels}")
    share = max_pixels if total_pixels is None else total_pixels // count
    return min_pixels, max(min_pixels, min(max_pixels, share))


def load_video(
    source: VideoSource,
    *,
    num_frames: int | None = None,
    fps: float | Callable[[float], float] | None = None,
    max_frames: int = 128,
    spacing: str = "inside",
    span: tuple[float, float] | None = None,
    frame_rate: float | None = None,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    total_pixels: int | None = None,
) -> Video:
    """Chooses frames of a video with `choose_frames`, and resizes them within `frame_limits`.

    Args:
      source: a video file; a folder of images, in the natural order of their names (2 before
        10); or a list of images, each as `open_rgb` takes it.
      fps: as in `choose_frames`, or a function from the video's frame rate to that.
      span: (start, end) in seconds; frames are chosen within.
      frame_rate: of a folder or list, frames per second, default 1; a file has its own.

    Raises:
      InputError: naming the file or argument that is missing, damaged, empty or out of range.
    """
    is_file = isinstance(source, str | os.PathLike) and not os.path.isdir(source)
    if frame_rate is not None and (is_file or not 0 < frame_rate < math.inf):
        raise InputError(f"frame_rate {frame_rate}: above 0, for folders and lists of images")
    listed, rate = _packets(source) if is_file else (_frame_sources(source), frame_rate or 1.0)
    fps = fps(rate) if callable(fps) else fps
    first, last = span_frames(len(listed), rate, span)
    length = last - first + 1
    indices = first + choose_frames(
        length, rate, num_frames=num_frames, fps=fps, max_frames=max_frames, spacing=spacing
    )
    limits = frame_limits(len(indices), min_pixels, max_pixels, total_pixels)
    needed = np.unique(indices)
    sources = _decoded(source, listed, needed) if is_file else (listed[i] for i in needed)
    # A generator, so that only one image at a time has its full size in memory.
    resized = (Image.fromarray(resized_pixels(frame, *limits)) for frame in sources)
    frames = dict(zip(needed, resized, strict=True))
    sampled = len(indices) * rate / length
    return Video(tuple(map(frames.get, indices)), indices / rate, sampled, len(listed) / rate)


def time_text(seconds: float) -> str:
    """Seconds as MM:SS.ss. As the official code, 59.996 is 00:60.00."""
    return f"{int(seconds // 60):02d}:{seconds % 60:05.2f}"


def video_prompt(video: Video, question: str, *, header: bool = True, labels: str = "times") -> str:
    """The prompt of a video: an <image> mark on a line for each frame, then the question.

        The time range of this video is [00:00-00:32], and the following is a series of ...
        [00:03.60]:<image>
        ...
        What colour is the umbrella?

    `header` is the first line; `labels` are "times", "numbers" (`Frame-1: <image>`) or "none".
    """
    if IMAGE_MARK in question:
        raise InputError(f"the question has {IMAGE_MARK}: a video's marks go in front, remove it")
    return (video_header(video) if header else "") + "".join(frame_marks(video, labels)) + question


def video_header(video: Video) -> str:
    """The line with the length of the video, the number of its frames and their rate."""
    return (
        f"The time range of this video is [00:00-{time_text(int(video.duration))[:-3]}], and the "
        f"following is a series of {len(video.frames)} frames sampled at {video.fps:.1f} FPS.\n"
    )


def frame_marks(video: Video, labels: str = "times") -> list[str]:
    """A line for each frame: its label (see `video_prompt`) and an <image> mark."""
    if labels not in LABELS:
        raise InputError(f"labels {labels!r}: use one of {', '.join(LABELS)}")
    return [
        LABELS[labels].format(time=time_text(time), number=number) + f"{IMAGE_MARK}\n"
        for number, time in enumerate(video.times, 1)
    ]


def _frame_sources(source: VideoSource) -> list[ImageSource]:
    if not isinstance(source, str | os.PathLike | list | tuple):
        raise InputError(f"a video is a path or a list of images, not {type(source).__name__}")
    if isinstance(source, list | tuple):
        found = list(source)
    else:
        names = [
            n for n in os.listdir(source) if n.lower().endswith(IMAGE_SUFFIXES) and n[0] != "."
        ]
        names.sort(key=lambda n: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", n)])
        found = [os.path.join(source, name) for name in names]
    if not found:
        raise InputError(f"video {source}: no images in it ({', '.join(IMAGE_SUFFIXES)})")
    return found


@contextlib.contextmanager
def _open(path: str | os.PathLike):
    try:
        import av
    except ImportError as error:
        raise InputError(f"video {path}: to read it, install neo-ov-jax[video]") from error
    if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would block for ever
        raise InputError(f"video {path}: not a file")
    # Titles need not be UTF-8. PyAV 19 reads them anyway, and no longer has the option to.
    has_option = int(av.__version__.split(".")[0]) < 19
    options = {"metadata_errors": "ignore"} if has_option else {}
    try:
        with av.open(os.path.abspath(path), **options) as container:
            stream = container.streams.best("video")
            # FFmpeg also renders plain text as a video of a terminal.
            if stream is None or container.format.name == "tty":
                raise InputError(f"video {path}: no video stream in it, or its end is cut off")
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"video {path}: cannot be read as a video: {error.strerror}") from error


def _packets(path: str | os.PathLike) -> tuple[list[tuple], float]:
    """(presentation time, decoding time, is a key frame) of each packet; and frames per second."""
    with _open(path) as (container, stream):
        packets = (packet for packet in container.demux(stream) if packet.size)
        found = [(p.pts, p.dts, p.is_keyframe, p.is_discard, p.is_corrupt) for p in packets]
        if len(found) < stream.frames or (found and found[-1][4]):
            raise InputError(f"video {path}: cut off after {len(found)} frames")
        listed = [packet[:3] for packet in found if not packet[3]]
        rate = stream.average_rate or stream.guessed_rate
        if not listed or not rate:
            raise InputError(f"video {path}: no frames in it")
        return listed, float(rate)


def _decoded(path, packets: list[tuple], indices: np.ndarray) -> Iterator[Image.Image]:
    """Decodes the frames `indices`, ascending, one by one. Seeks past groups that have none."""
    with _open(path) as (container, stream):
        timed = all(shown is not None for shown, _, _ in packets)
        places = sorted(shown for shown, _, _ in packets) if timed else range(len(packets))
        # Only in these formats is a seek exact; in others it may land too late.
        exact = timed and container.format.name.startswith(("mov", "matroska"))
        starts = sorted((p[0], p[0] if p[1] is None else p[1]) for p in packets if p[2] and exact)
        decoded, here = enumerate(container.decode(stream)), -math.inf
        for place in (places[index] for index in indices):
            group = bisect.bisect(starts, (place, math.inf)) - 1
            if group > 0 and starts[group][0] > here:
                container.seek(starts[group][1], stream=stream)
                decoded = enumerate(container.decode(stream))
            while here < place:
                number, frame = next(decoded, (0, None))
                if frame is None:
                    raise InputError(f"video {path}: damaged, its last frames cannot be decoded")
                here = frame.pts if timed else number
            # Phones store frames sideways, with the rotation that sets them upright.
            yield frame.to_image().rotate(frame.rotation, expand=True)
