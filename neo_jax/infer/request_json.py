"""Requests as JSON objects, one per line. Every field is checked; errors name it."""

import difflib
import hashlib
import inspect
import json
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

from neo_jax.data.video import load_video
from neo_jax.errors import InputError
from neo_jax.infer.request import Request
from neo_jax.infer.sampling import Sampling

_PLAIN = {"prompt": str, "system": str, "min_pixels": int, "max_pixels": int, "video_options": dict}
_PATHS = {"image": str, "images": list[str], "video": str | list[str]}
_TURNS = {"messages": list[dict[str, str]], "history": list[tuple[str, str]]}
_STOPS = {"stop": str | list[str], "stop_token_ids": list[int]}
_SAMPLING = typing.get_type_hints(Sampling) | _STOPS
_FIELDS = _PLAIN | _PATHS | _TURNS | _SAMPLING
_HINTS = typing.get_type_hints(load_video)
_VIDEO_OPTIONS = {name: _HINTS[name] for name in load_video.__kwdefaults__}
_VIDEO_OPTIONS["fps"] = float | None  # a function is no JSON


class Record(typing.NamedTuple):
    """The request in a line of a file."""

    line: int  # number, from 1
    id: str | int  # the line's number as text if it has none; "line 7" if 7 cannot be read
    key: str  # digest of what decides the answer, the contents of images aside
    meta: object  # the user's own
    request: Request | None
    error: str | None  # why there is no request


def read_records(path: Path, defaults: Mapping, settings: Mapping) -> Iterator[Record]:
    """The records of a file, but for blank lines.

    Args:
      path: each line as for `request_from`, besides "id" and "meta"; null counts as not given.
      defaults: as for `request_from`.
      settings: what else decides the answers; JSON.

    Raises:
      InputError: when the file cannot be read. What is wrong with a line, its record says.
    """
    try:
        if path.exists() and not path.is_file():  # nor a pipe: it is read more than once
            raise InputError(f"{path}: not a file: name one with a JSON object a line")
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    yield _record(number, raw.strip(), path.parent, defaults, settings)
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from error


def _record(number: int, raw: bytes, folder: Path, defaults: Mapping, settings: Mapping) -> Record:
    name, key, meta, request, error = f"line {number}", _digest(str(raw)), None, None, None
    try:
        fields = json.loads(raw.decode("utf-8-sig"))
        if not isinstance(fields, dict):
            raise InputError("not a JSON object")
        fields = without_nulls(fields)
        own = fields.pop("id", str(number))
        if type(own) not in (str, int):
            raise InputError(f"id is {reprlib.repr(own)}: use a text or an integer")
        name, key = own, _digest([settings, {**defaults, **fields}])
        meta = fields.pop("meta", None)
        request = request_from(fields, folder, defaults)
    except json.JSONDecodeError as problem:
        error = f"not JSON: {problem.msg} at column {problem.colno}"
    except (ValueError, RecursionError) as problem:
        error = str(problem)
    return Record(number, name, key, meta, request, error)


def request_from(fields: Mapping, folder: Path, defaults: Mapping) -> Request:
    """Makes a Request.

    Args:
      fields: of Request and Sampling, as JSON. Besides, `image` is one of `images`; and `messages`,
        [{"role": "system" | "user" | "assistant", "content": text}, ...], stands for `prompt`,
        `history` and `system`.
      folder: where relative paths start.
      defaults: what is not given.

    Raises:
      InputError: naming the field that is unknown, missing or wrong.
    """
    _check(fields, _FIELDS)
    _check(fields.get("video_options", {}), _VIDEO_OPTIONS)
    given = {**defaults, **_without_messages(fields)}
    if "prompt" not in given:
        raise InputError("no prompt: give a prompt or messages")
    if "image" in given and "images" in given:
        raise InputError("give image or images, not both")
    images = [given["image"]] if "image" in given else given.get("images", [])
    if isinstance(video := given.get("video"), str):
        video = str(folder / video)
    elif video is not None:
        video = [str(folder / path) for path in video]
    return Request(
        images=tuple(str(folder / path) for path in images),
        video=video,
        history=tuple(map(tuple, given["history"])) if "history" in given else None,
        sampling=Sampling(**{name: given[name] for name in _SAMPLING if name in given}),
        **{name: given[name] for name in _PLAIN if name in given},
    )


def without_nulls(fields: Mapping) -> dict:
    return {name: value for name, value in fields.items() if value is not None}


def _without_messages(fields: Mapping) -> dict:
    """The fields with a prompt, history and system prompt in place of messages."""
    rest = dict(fields)
    if "messages" not in rest:
        return rest
    if rest.keys() & {"prompt", "history", "system"}:
        raise InputError("give messages, or prompt, history and system, not both")
    messages = rest.pop("messages")
    if any(message.keys() != {"role", "content"} for message in messages):
        raise InputError("messages: give each a role and a content; images go into images")
    if messages and messages[0]["role"] == "system":
        rest["system"], messages = messages[0]["content"], messages[1:]
    texts = [message["content"] for message in messages]
    turns = (["user", "assistant"] * len(messages))[: len(messages)]
    if len(messages) % 2 == 0 or [message["role"] for message in messages] != turns:
        raise InputError("messages: system, if any, then user and assistant in turn, user last")
    rest["prompt"] = texts.pop()
    if texts:
        rest["history"] = list(zip(texts[::2], texts[1::2], strict=True))
    return rest


def _check(fields: Mapping, kinds: dict) -> None:
    for name, value in fields.items():
        if name not in kinds:
            near = difflib.get_close_matches(name, [*kinds, "id", "meta"], 1)
            hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(kinds)}"
            raise InputError(f"unknown field {reprlib.repr(name)}: {hint}")
        if not _fits(value, kinds[name]):
            kind = inspect.formatannotation(kinds[name])
            raise InputError(f"{name} is {reprlib.repr(value)}: use {kind}")


def _fits(value, kind) -> bool:
    """Whether what JSON gave is of a type: its lists are tuples too, its integers floats too."""
    parts, container = typing.get_args(kind), typing.get_origin(kind)
    if container is types.UnionType:
        return any(_fits(value, part) for part in parts)
    if container is list:
        return isinstance(value, list) and all(_fits(part, parts[0]) for part in value)
    if container is dict:
        return isinstance(value, dict) and all(_fits(part, parts[1]) for part in value.values())
    if container is tuple:
        is_as_long = isinstance(value, list) and len(value) == len(parts)
        return is_as_long and all(map(_fits, value, parts))
    if kind is int or kind is float:
        return type(value) in (int, kind) and abs(value) < 2**53
    if kind is str and isinstance(value, str):  # half a surrogate pair is no text
        return value.isascii() or value == value.encode(errors="ignore").decode()
    return isinstance(value, kind)


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
