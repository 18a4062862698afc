"""Records as rows of Parquet files, as Hugging Face writes them.

To read one row, all of its row group is read. Shuffled records want small groups: 100 rows of
images, as Hugging Face writes.
"""

import functools
import glob
import os
import threading

import numpy as np

from neo_jax.data.record import FIELDS, make_record, require
from neo_jax.errors import InputError

GROUPS = 8  # row groups in the cache of a process
_LOCKS = tuple(threading.Lock() for _ in range(16))


class ParquetRecords:
    """Rows of a file, or of a folder's files in the order of their names.

    Columns: `conversations`, and any of `image`, `images` and `video`, as `make_record` takes them.
    """

    is_ordered = False

    def __init__(self, path: str):
        self.name, self._paths = path, [path]
        if os.path.isdir(path):
            self._paths = sorted(glob.glob(os.path.join(glob.escape(path), "*.parquet")))
            if not self._paths:
                raise InputError(f"{path}: a folder without .parquet files")
        rows, groups = [], []
        for part, file in enumerate(self._paths):
            sizes = _group_sizes(file)
            rows += sizes
            groups += [(part, group) for group in range(len(sizes))]
        self._ends = np.cumsum(rows, dtype=np.int64)
        self._groups = np.array(groups, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict:
        place = int(np.searchsorted(self._ends, index, side="right"))
        part, group = self._groups[place]
        path = self._paths[part]
        # Threads that want the same group wait until one of them has read it.
        with _LOCKS[place % len(_LOCKS)]:
            table = _row_group(path, int(group))
        row = index - int(self._ends[place]) + table.num_rows
        fields = table.slice(row, 1).to_pylist()[0]
        return make_record(fields, os.path.dirname(os.path.abspath(path)))

    def where(self, index: int) -> str:
        place = int(np.searchsorted(self._ends, index, side="right"))
        part = self._groups[place, 0]
        first = int(np.searchsorted(self._groups[:, 0], part))
        row = index - (int(self._ends[first - 1]) if first else 0)
        return f"{self._paths[part]}[{row}]"


def _parquet(path: str):
    return require("pyarrow.parquet", "pyarrow", path)


def _group_sizes(path: str) -> list[int]:
    try:
        with _parquet(path).ParquetFile(path) as file:
            names, metadata = file.schema_arrow.names, file.metadata
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: most of pyarrow's own
        raise InputError(f"{path}: not a Parquet file, or damaged: {error}") from error
    if "conversations" not in names:
        raise InputError(f"{path}: has no column conversations, but {', '.join(names)}")
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


@functools.lru_cache(maxsize=GROUPS)
def _row_group(path: str, group: int):
    """A pyarrow table of a row group, with the columns that records have."""
    try:
        with _parquet(path).ParquetFile(path) as file:
            names = [name for name in FIELDS if name in file.schema_arrow.names]
            return file.read_row_group(group, columns=names)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"group {group} of rows cannot be read: {error}") from error
