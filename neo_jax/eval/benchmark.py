"""`Benchmark`: a dataset table with its prompt, its scorer and its metrics.

The table in `benchmarks.py` has one for each benchmark. A benchmark turns a row of its dataset
into a `Request`; the engine answers it (`predictions.py`); `score_row` and `summarise` turn the
answers into metrics (`score_predictions.py`).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neo_jax.data.chat import IMAGE_MARK
from neo_jax.errors import InputError
from neo_jax.eval.messages import Frames, Layout, Message, general, read_subtitles, spatial
from neo_jax.eval.scoring.metrics import Metric, ScoredRow, Verdict
from neo_jax.eval.settings import Settings
from neo_jax.eval.tables import hub, media
from neo_jax.eval.tables.benchmark_files import Table, is_image_column
from neo_jax.eval.tables.rows import Row, need
from neo_jax.infer.request import Request


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark:
    """A dataset with its prompt, its scorer and its metrics."""

    name: str  # on the command line
    title: str
    group: str  # "image", "video" or "spatial": the default settings and prompt layout
    files: tuple[str, ...]  # names of its file or folder, without endings
    score_row: Callable[[Row, str], Verdict]  # the scorer: a row and the answer to it
    summarise: Callable[[Sequence[ScoredRow]], list[Metric]]  # the first metric is the headline
    ask: Callable[[Row, int], Message] | None = None  # the prompt: a row and its number of images
    ask_video: Callable[[Row], str] | None = None  # of a video: the text after the frames
    frames: Frames = dataclasses.field(default_factory=Frames)  # the prompt layout of a video
    has_subtitles: bool = False  # the file at `subtitle_path` is part of the prompt
    videos: Callable[[Row], Sequence[str]] | None = None  # possible names of the video
    layout: Layout | None = None  # the prompt layout of images; default: the group's
    adapt: Callable[[dict[str, Any]], dict[str, Any]] = hub.standard  # to the official columns
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # over the group's
    published: tuple[float, float] | None = None  # NEO-ov 2B, 9B
    source: str = ""  # URL of the dataset
    note: str = ""  # a remark for the report

    def row(self, table: Table, number: int) -> dict[str, Any]:
        """A row, its columns named as in the official TSV."""
        return self.adapt(table.row(number))

    def is_left_out(self, row: Row, table: Table) -> bool:
        """Whether the row lacks the image that other rows have: the official code skips it."""
        if self.ask_video is not None:
            return False
        return table.has_images and not any(map(is_image_column, row))

    def request(
        self, row: Row, number: int, table: Table, settings: Settings, folders: Sequence[Path]
    ) -> Request:
        """The request for a row.

        Args:
          number: of the row, from 0; a sampled answer's seed depends on it.
          folders: searched for images, videos and subtitles.

        Raises:
          InputError: for a cell or file that is missing or cannot be used.
        """
        options = {
            "system": settings.system,
            "sampling": settings.sampling(number),
            "min_pixels": settings.min_pixels,
            "max_pixels": settings.max_pixels,
        }
        images = media.images(row, table, folders)
        if self.ask_video is not None:
            question = settings.prefix + self.ask_video(row)
            return Request(
                prompt=question,
                images=images if IMAGE_MARK in question else (),
                video=media.video([str(name) for name in self.videos(row) if name], folders),
                video_options=_video_options(row, settings),
                lay_out=self._frame_layout(row, folders),
                **options,
            )
        message = self.ask(row, len(images))
        if settings.prefix:
            message = [settings.prefix, *message]
        layout = self.layout or (spatial if self.group == "spatial" else general)
        return Request(
            prompt=layout(message),
            images=images[: list(message).count(None)],
            num_upscaled=int(settings.upscale),
            **options,
        )

    def _frame_layout(self, row: Row, folders: Sequence[Path]) -> Frames:
        if not self.has_subtitles or "subtitle_path" not in row:
            return self.frames
        name = str(row["subtitle_path"])
        places = [folder / base / name for folder in folders for base in ("subtitles", "")]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise InputError(f"subtitles {name}: not in {', '.join(map(str, folders))}")
        return dataclasses.replace(self.frames, subtitles=read_subtitles(found, row))


def _video_options(row: Row, settings: Settings) -> dict[str, Any]:
    chosen: dict[str, Any] = {"fps": settings.fps}
    if settings.num_frames:
        chosen = {"num_frames": settings.num_frames, "spacing": settings.spacing}
    if "start" in row and row.get("bound") not in (False, "False"):  # MVBench's
        chosen["span"] = (_seconds(row, "start"), _seconds(row, "end"))
    if row.get("data_type") == "frame":
        chosen["frame_rate"] = 3.0  # MVBench's folders of frames
    return {
        **chosen,
        "max_frames": max(settings.max_frames, settings.num_frames),
        "min_pixels": settings.min_pixels,
        "max_pixels": settings.max_pixels,
    }


def _seconds(row: Row, column: str) -> float:
    value = need(row, column)
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise InputError(f"{column} {value!r}: not a number of seconds")
    return seconds
