"""Files of training records with random access: only offsets are kept in memory."""

import os
from typing import Protocol

from neo_jax.data.array_records import ArrayRecords
from neo_jax.data.json_files import JsonArray, JsonLines
from neo_jax.data.parquet_files import ParquetRecords
from neo_jax.data.synthetic_records import ShapeRecords
from neo_jax.data.tfds_records import SCHEME, TfdsRecords
from neo_jax.errors import InputError

SYNTHETIC = "shapes:"
KINDS = {
    ".jsonl": JsonLines,
    ".json": JsonArray,
    ".parquet": ParquetRecords,
    ".arrayrecord": ArrayRecords,
    ".array_record": ArrayRecords,
}


class Records(Protocol):
    """Records by index. Instances are sent to worker processes, so they are cheap to pickle."""

    name: str  # of the file
    is_ordered: bool  # a curriculum, which is not shuffled

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict:
        """The record, as `make_record` gives it; InputError says why it cannot be read."""

    def where(self, index: int) -> str:
        """The file and place of a record: `a.jsonl:17` is a line, `a.json[16]` an index."""


def open_records(path: str) -> Records:
    """Opens a file of records by its suffix, or a folder of .parquet files.

    `tfds:NAME/CONFIG:SPLIT?data_dir=DIR` is a prepared data set of tensorflow-datasets;
    `shapes:...` are synthetic images (`synthetic_records.py`).

    Raises:
      InputError: naming the file that cannot be read, and the place in it.
    """
    if path.startswith(SCHEME):
        records = TfdsRecords(path)
    elif path.startswith(SYNTHETIC):
        records = ShapeRecords(path)
    elif os.path.isdir(path):
        records = ParquetRecords(path)
    else:
        kind = KINDS.get(os.path.splitext(path)[1].lower())
        if kind is None:
            known = ", ".join(KINDS)
            raise InputError(f"{path}: not a file of records: use {known} or {SCHEME}NAME")
        if not os.path.exists(path):
            raise InputError(f"{path}: no such file")
        if not os.path.isfile(path):  # a pipe has no random access
            raise InputError(f"{path}: not a file")
        records = kind(path)
    if not len(records):
        raise InputError(f"{path}: has no records")
    return records
