"""Dataset tables: the rows of a TSV, Parquet or JSON file, read one at a time.

    MMBench_DEV_EN.tsv                    as VLMEvalKit publishes it, images in base64
    MMMU/validation-00000-of-00001.parquet, ...   as on the Hugging Face hub
    lvbench.jsonl                         an object a line, or .json with a list of them

Nothing is downloaded. TSV and Parquet files may be larger than memory.
"""

import abc
import csv
import functools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from neo_jax.errors import InputError
from neo_jax.eval.tables.rows import make_row

KINDS = (".tsv", ".parquet", ".jsonl", ".json")
_REFERENCE = 64  # an image cell of at most this many characters is the index of another row

csv.field_size_limit(sys.maxsize)


def is_image_column(name: str) -> bool:
    """Whether a column holds images; such cells are not kept with the answers."""
    return re.fullmatch(r"images?|image_\d+", name) is not None


class Table(abc.ABC):
    """A dataset's rows by number, from 0. `row` leaves out empty cells and decodes no images."""

    columns: Sequence[str] = ()

    def __init__(self, path: Path):
        self.path = path

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def row(self, number: int) -> dict[str, Any]: ...

    def where(self, number: int) -> str:
        """The file and row, for error messages."""
        return f"{self.path.name}, row {number + 1}"

    @property
    def has_images(self) -> bool:
        """Whether there is an image column."""
        return any(map(is_image_column, self.columns))

    def image_of(self, index: str) -> str | None:
        """The image cell of the row that has this index."""
        return None


def open_table(path: Path) -> Table:
    """Opens a file, or a folder's files of one kind in the order of their names.

    Raises:
      InputError: naming the file that is missing, of another kind, damaged or empty.
    """
    paths = [path]
    if path.is_dir():
        paths = sorted(found for found in path.rglob("*") if found.suffix in KINDS)
        kinds = {found.suffix for found in paths}
        if len(kinds) != 1:
            found = f"files of {len(kinds)} kinds ({', '.join(sorted(kinds))})" if kinds else "none"
            raise InputError(f"{path}: one kind of {', '.join(KINDS)} is needed in it, not {found}")
    elif not path.is_file():
        raise InputError(f"{path}: no such file")
    elif path.suffix not in KINDS:
        raise InputError(f"{path}: not one of {', '.join(KINDS)}")
    kind = {".tsv": TsvTable, ".parquet": ParquetTable}.get(paths[0].suffix, JsonTable)
    try:
        parts = [kind(part) for part in paths]
    except (OSError, UnicodeDecodeError, csv.Error, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    table = parts[0] if len(parts) == 1 else ConcatenatedTable(path, parts)
    if not len(table):
        raise InputError(f"{path}: no rows in it")
    return table


class ConcatenatedTable(Table):
    """Several files as one table."""

    def __init__(self, path: Path, parts: list[Table]):
        super().__init__(path)
        self._parts, self.columns = parts, parts[0].columns

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def _part_of(self, number: int) -> tuple[Table, int]:
        for part in self._parts:
            if number < len(part):
                return part, number
            number -= len(part)
        raise IndexError(number)

    def row(self, number: int) -> dict[str, Any]:
        part, number = self._part_of(number)
        return part.row(number)

    def where(self, number: int) -> str:
        part, number = self._part_of(number)
        return part.where(number)

    def image_of(self, index: str) -> str | None:
        found = (part.image_of(index) for part in self._parts)
        return next((image for image in found if image is not None), None)


class TsvTable(Table):
    """A TSV file; only the byte offsets of its rows are in memory."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._file = open(path, "rb")  # noqa: SIM115  (kept open: rows are read from it)
        lines = _Lines(self._file)
        records = csv.reader(lines, delimiter="\t")
        self.columns = next(records, [])
        self._offsets, self._numbers = [], {}
        begin = lines.offset
        for cells in records:
            if cells:
                if len(cells) != len(self.columns):
                    raise InputError(
                        f"{self.where(len(self._offsets))}: {len(cells)} cells, but "
                        f"{len(self.columns)} columns: is a tab or quote missing?"
                    )
                cell = dict(zip(self.columns, cells, strict=True)).get("index", "")
                self._numbers.setdefault(cell, len(self._offsets))
                self._offsets.append(begin)
            begin = lines.offset

    def __len__(self) -> int:
        return len(self._offsets)

    def row(self, number: int) -> dict[str, Any]:
        self._file.seek(self._offsets[number])
        cells = next(csv.reader(_Lines(self._file), delimiter="\t"))
        return make_row(dict(zip(self.columns, cells, strict=True)))

    def image_of(self, index: str) -> str | None:
        number = self._numbers.get(index)
        return None if number is None else self.row(number).get("image")


class _Lines:
    """The lines of a file as text; `offset` is the end of the last one in bytes."""

    def __init__(self, file: BinaryIO):
        self._file, self.offset, self._is_first = file, file.tell(), file.tell() == 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        self.offset += len(line)
        encoding = "utf-8-sig" if self._is_first else "utf-8"
        self._is_first = False
        return line.decode(encoding)


class ParquetTable(Table):
    """A Parquet file, read one row group at a time."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._file = pyarrow.parquet.ParquetFile(path)
        self.columns = self._file.schema_arrow.names
        metadata = self._file.metadata
        self._sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]

        @functools.lru_cache(maxsize=1)
        def group(number: int) -> pyarrow.Table:
            return self._file.read_row_group(number)

        self._group = group

    def __len__(self) -> int:
        return sum(self._sizes)

    def row(self, number: int) -> dict[str, Any]:
        for group, size in enumerate(self._sizes):
            if number < size:
                return make_row(self._cells(group, number))
            number -= size
        raise IndexError(number)

    def _cells(self, group: int, number: int) -> dict[str, Any]:
        try:
            return self._group(group).slice(number, 1).to_pylist()[0]
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise InputError(
                f"{self.path}: row {number} of group {group} cannot be read: {error}: replace the "
                "file, then --retry-errors"
            ) from error


class JsonTable(Table):
    """A JSON list of objects, or JSON lines; in memory as a whole."""

    def __init__(self, path: Path):
        super().__init__(path)
        text = path.read_text(encoding="utf-8-sig")
        self._rows = _parse_json(text, path) if path.suffix == ".json" else _json_lines(text, path)
        if not isinstance(self._rows, list) or not all(isinstance(r, dict) for r in self._rows):
            raise InputError(f"{path}: not a list of JSON objects")
        self.columns = list(dict.fromkeys(name for row in self._rows for name in row))

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> dict[str, Any]:
        return make_row(self._rows[number])


def _json_lines(text: str, path: Path) -> list[Any]:
    # Not splitlines: it also splits at U+2028 and the like, which JSON may hold as they are.
    lines = enumerate(text.split("\n"), 1)
    return [_parse_json(line, path, number) for number, line in lines if line.strip()]


def _parse_json(text: str, path: Path, first: int = 1) -> Any:
    """Parses JSON that begins in line `first` of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{first + error.lineno - 1}"
        raise InputError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:  # an integer of too many digits
        raise InputError(f"{path}:{first}: cannot be read: {error}") from error


def resolve(table: Table, cell: Any) -> Any:
    """An image cell; of a short one, the image cell of the row that it refers to."""
    if not isinstance(cell, str) or len(cell) > _REFERENCE:
        return cell
    found = table.image_of(cell)
    if found is None or len(found) <= _REFERENCE:
        raise InputError(f"image {cell!r}: neither an image nor the index of a row that has one")
    return found
