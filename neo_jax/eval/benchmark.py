"""What a benchmark is made of: one of these is a row of the table in `benchmarks.py`."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neo_jax.data.chat import IMAGE_MARK
from neo_jax.errors import InputError
from neo_jax.eval.messages import Frames, Layout, Message, general, read_subtitles, spatial
from neo_jax.eval.scoring.summary import Metric, ScoredRow, Verdict
from neo_jax.eval.settings import Settings
from neo_jax.eval.tables import hub, media
from neo_jax.eval.tables.benchmark_files import Table, is_picture_column
from neo_jax.eval.tables.rows import Row, need
from neo_jax.infer.request import Request


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark:
    """How a benchmark asks, is scored and is reported."""

    name: str  # on the command line
    title: str
    group: str  # "image", "video" or "spatial": which settings and layout it starts from
    files: tuple[str, ...]  # names, without endings, that its file or folder may have
    score_row: Callable[[Row, str], Verdict]
    summarise: Callable[[Sequence[ScoredRow]], list[Metric]]  # the first is the headline
    ask: Callable[[Row, int], Message] | None = None  # row and how many pictures it has
    ask_video: Callable[[Row], str] | None = None  # the text behind the frames
    frames: Frames = dataclasses.field(default_factory=Frames)
    has_subtitles: bool = False  # whether `subtitle_path` is part of the question
    videos: Callable[[Row], Sequence[str]] | None = None  # names under which the video may be
    layout: Layout | None = None  # default: the group's
    adapt: Callable[[dict[str, Any]], dict[str, Any]] = hub.standard
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    published: tuple[float, float] | None = None  # NEO-ov 2B, 9B
    source: str = ""  # where its file comes from
    note: str = ""  # what a reader of the score should know

    def row(self, table: Table, number: int) -> dict[str, Any]:
        return self.adapt(table.row(number))

    def is_left_out(self, row: Row, table: Table) -> bool:
        """Whether the row lacks the picture that others have: officially it is not asked."""
        if self.ask_video is not None:
            return False
        return table.has_pictures and not any(map(is_picture_column, row))

    def request(
        self, row: Row, number: int, table: Table, settings: Settings, folders: Sequence[Path]
    ) -> Request:
        """What to ask the model.

        Raises:
          InputError: for a cell or file that is missing or cannot be used.
        """
        options = {
            "system": settings.system,
            "sampling": settings.sampling(number),
            "min_pixels": settings.min_pixels,
            "max_pixels": settings.max_pixels,
        }
        pictures = media.pictures(row, table, folders)
        if self.ask_video is not None:
            question = settings.prefix + self.ask_video(row)
            return Request(
                prompt=question,
                images=pictures if IMAGE_MARK in question else (),
                video=media.video([str(name) for name in self.videos(row) if name], folders),
                video_options=_video_options(row, settings),
                lay_out=self._frames(row, folders),
                **options,
            )
        message = self.ask(row, len(pictures))
        if settings.prefix:
            message = [settings.prefix, *message]
        layout = self.layout or (spatial if self.group == "spatial" else general)
        return Request(
            prompt=layout(message),
            images=pictures[: list(message).count(None)],
            num_upscaled=int(settings.upscale),
            **options,
        )

    def _frames(self, row: Row, folders: Sequence[Path]) -> Frames:
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
    said = need(row, column)
    try:
        seconds = float(said)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise InputError(f"{column} {said!r}: not a number of seconds")
    return seconds
