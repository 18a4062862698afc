"""The images and videos of a row, as encoded bytes or paths."""

import base64
import binascii
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neo_jax.errors import InputError
from neo_jax.eval.tables.benchmark_files import Table, resolve
from neo_jax.eval.tables.rows import Row, is_missing, listed

VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif")
_NUMBERED = re.compile(r"image_(\d+)")

EncodedImage = bytes | str  # the bytes of a file, or its path


def images(row: Row, table: Table, folders: Sequence[Path]) -> list[EncodedImage]:
    """The row's images in order; an empty list if it has no image cell.

    A cell is base64, the text of a list of them, the index of a row that has the image, bytes,
    {"bytes": ..., "path": ...}, or a list of these; `image_1`, `image_2` and so on are one each;
    `image_path` is a path or a list of them, looked for in `folders`.

    Raises:
      InputError: for a cell that is none of these, or a file that is in none of the folders.
    """
    numbered = sorted((int(m[1]), m[0]) for m in map(_NUMBERED.fullmatch, row) if m)
    columns = [name for name in ("image", "images") if name in row] or [n for _, n in numbered]
    if columns:
        cells = [resolve(table, row[name]) for name in columns]
        return [one for cell in cells for one in _of_cell(cell, folders)]
    return [_find_image(path, folders) for path in listed(row.get("image_path", []))]


def _of_cell(cell: Any, folders: Sequence[Path]) -> list[EncodedImage]:
    if isinstance(cell, str):
        return [_decode_base64(text) for text in listed(cell)]
    if isinstance(cell, list | tuple):
        return [one for part in cell if not is_missing(part) for one in _of_cell(part, folders)]
    if isinstance(cell, bytes):
        return [cell]
    if isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes):
        return [cell["bytes"]]
    if isinstance(cell, dict) and isinstance(cell.get("path"), str):
        return [_find_image(cell["path"], folders)]
    raise InputError(f"image: {type(cell).__name__} is neither base64, bytes nor a path")


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text.split(",", 1)[-1] if text[:5] == "data:" else text)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"image: bad base64: {error}") from error


# os.path.exists, not Path.exists: the latter raises if a name is too long for the file system.
def _find_image(path: str, folders: Sequence[Path]) -> str:
    places = [folder / path.strip().lstrip("/") for folder in folders]
    if Path(path).is_absolute():
        places.insert(0, Path(path))
    for place in places:
        if os.path.exists(place):
            return str(place)
    raise InputError(f"{path}: not in {', '.join(map(str, folders))}: see --media")


def video(names: Sequence[str], folders: Sequence[Path]) -> str:
    """The path of a row's video: a file or a folder of frames.

    Looks for each name in each folder and in its `videos`, `video` and `data`, as it is and with
    the usual endings.

    Args:
      names: possible names of the video, the likeliest first.

    Raises:
      InputError: if none of them exists.
    """
    for name in names:
        for folder in folders:
            for base in (folder, folder / "videos", folder / "video", folder / "data"):
                place = base / name.lstrip("/")
                for path in (place, *(place.with_name(place.name + end) for end in VIDEOS)):
                    if os.path.exists(path):
                        return str(path)
    tried = " or ".join(dict.fromkeys(names))
    raise InputError(f"video {tried}: not in {', '.join(map(str, folders))}: see --media")
