"""A record in the form that all file formats share: its images are absolute paths or bytes."""

import base64
import importlib
import json
import os
from collections.abc import Mapping
from types import ModuleType

from neo_jax.errors import InputError

MEDIA_FIELDS = ("image", "images", "video")
FIELDS = ("conversations", *MEDIA_FIELDS)


def parse_json(raw: str | bytes):
    try:
        return json.loads(raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from error


def make_record(fields, folder: str) -> dict:
    """The record of the fields that a file has.

    Args:
      fields: `conversations` may also be JSON text, or columns, {"from": [...], "value": [...]}.
        An image is a path, bytes, or {"bytes": bytes or base64, "path": a path}.
      folder: of relative paths.

    Raises:
      InputError: if `fields` is no mapping, or for an image of another type. Turns are not checked
        here.
    """
    if not isinstance(fields, Mapping):
        raise InputError(f"a record is a JSON object, not {type(fields).__name__}")
    record = dict(fields)
    turns = record.get("conversations")
    if isinstance(turns, str):
        turns = parse_json(turns)
    if isinstance(turns, Mapping) and all(isinstance(column, list) for column in turns.values()):
        turns = _rows(turns)
    for name in MEDIA_FIELDS:
        value = record.get(name)
        if isinstance(value, list | tuple):
            record[name] = [_image(name, one, folder) for one in value]
        elif value is not None:
            record[name] = _image(name, value, folder)
    return record | {"conversations": turns}


def require(module: str, package: str, path: str) -> ModuleType:
    """Imports a module that only some files need; InputError names the missing package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{path}: this needs {package}, which is not installed") from error


def _rows(columns: Mapping[str, list]) -> list[dict]:
    try:
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    except ValueError as error:
        raise InputError("conversations: its columns differ in length") from error


def _image(name: str, value, folder: str) -> str | bytes:
    if isinstance(value, Mapping):
        raw = value.get("bytes")
        # Hugging Face writes both; either may be null.
        value = _decoded(name, raw) if isinstance(raw, str) else raw or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and value and "\0" not in value:  # C libraries end a path at \0
        return os.path.join(folder, value)
    raise InputError(f"{name}: use a path or encoded bytes, not {value!r:.40}")


def _decoded(name: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise InputError(f"{name}: its bytes are not base64: {error}") from error
