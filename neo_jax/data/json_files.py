"""Records as JSON: one a line, or the elements of an array. Only their offsets are in memory."""

import contextlib
import mmap
import os
import re
from array import array

import numpy as np

from neo_jax.data.record import make_record, parse_json
from neo_jax.errors import InputError

# The text up to and with the next bracket (or comma); it skips strings. Possessive, so linear.
_BRACKET = rb'[^"{}\[\]]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"{}\[\]]*+)*+[{}\[\]]'
_TO_BRACKET = re.compile(_BRACKET, re.DOTALL)
_TO_SEPARATOR = re.compile(_BRACKET.replace(rb"\[\]", rb"\[\],"), re.DOTALL)
_BLANK = re.compile(rb"(?:\xef\xbb\xbf)?\s*")


class JsonLines:
    """A file with a JSON object on each line. Blank lines are skipped."""

    is_ordered = False

    def __init__(self, path: str):
        self.name, self._folder = path, _folder(path)
        starts, blanks, start = array("q"), array("q"), 0
        with _opened(path) as file:
            for line in file:
                if line.strip():
                    starts.append(start)
                else:
                    blanks.append(len(starts))
                start += len(line)
        self._starts = np.array(starts, np.int64)
        self._blanks = np.array(blanks, np.int64)  # for each blank line, records before it

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict:
        with _opened(self.name) as file:
            file.seek(self._starts[index])
            raw = file.readline()
        return make_record(parse_json(raw), self._folder)

    def where(self, index: int) -> str:
        blanks = np.searchsorted(self._blanks, index, side="right")
        return f"{self.name}:{index + 1 + blanks}"


class JsonArray:
    """A file that is one JSON array; each element is a record."""

    is_ordered = False

    def __init__(self, path: str):
        self.name, self._folder = path, _folder(path)
        with _opened(path) as file:
            if not os.fstat(file.fileno()).st_size:
                raise InputError(f"{path}: is empty")
            text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            try:
                self._places = np.array(_separators(text), np.int64)
            except InputError as error:
                raise InputError(f"{path}: {error}") from error

    def __len__(self) -> int:
        return len(self._places) - 1

    def __getitem__(self, index: int) -> dict:
        start, end = self._places[index] + 1, self._places[index + 1]
        with _opened(self.name) as file:
            file.seek(start)
            raw = file.read(end - start)
        return make_record(parse_json(raw), self._folder)

    def where(self, index: int) -> str:
        return f"{self.name}[{index}]"


def _separators(text: mmap.mmap) -> array:
    """Offsets of the array's opening bracket, of the commas between elements, and of its end.

    The text of an element is parsed only when it is read: a bad element spoils no other.
    """
    start = _BLANK.match(text).end()
    if text[start : start + 1] != b"[":
        hint = ", or name it .jsonl if it has one a line" if text[start : start + 1] == b"{" else ""
        raise InputError(f"must be a JSON array of records{hint}")
    found, place, depth = array("q", [start]), start + 1, 1
    while depth:
        match = (_TO_SEPARATOR if depth == 1 else _TO_BRACKET).match(text, place)
        if match is None:
            raise InputError(f"cut off: [{len(found) - 1}], from byte {found[-1] + 1}, has no end")
        place = match.end()
        mark = text[place - 1 : place]
        if mark == b",":
            found.append(place - 1)
        else:
            depth += 1 if mark in b"{[" else -1
    end = _BLANK.match(text, place).end()
    if end < len(text):
        raise InputError(f"goes on after the array's end, at byte {end}")
    if len(found) > 1 or text[start + 1 : place - 1].strip():  # else it is empty
        found.append(place - 1)
    return found


@contextlib.contextmanager
def _opened(path: str):
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from error


def _folder(path: str) -> str:
    return os.path.dirname(os.path.abspath(path))
