"""Files of training records, read at random: nothing but places is kept in memory."""

import os
from typing import Protocol

from neo_jax.data.array_records import ArrayRecords
from neo_jax.data.json_files import JsonArray, JsonLines
from neo_jax.data.parquet_files import ParquetRecords
from neo_jax.data.synthetic_records import ShapeRecords
from neo_jax.data.tfds_records import SCHEME, TfdsRecords
from neo_jax.errors import InputError

DRAWN = "shapes:"
KINDS = {
    ".jsonl": JsonLines,
    ".json": JsonArray,
    ".parquet": ParquetRecords,
    ".arrayrecord": ArrayRecords,
    ".array_record": ArrayRecords,
}


class Records(Protocol):
    """Records by index. Instances go to worker processes, so they are cheap to pickle."""

    name: str  # the file
    is_ordered: bool  # to be seen in this order, not shuffled

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict:
        """The record as `make_record` gives it; InputError, of which `where` is the place."""

    def where(self, index: int) -> str:
        """The record's file and place there: `a.jsonl:17`, a line; `a.json[16]`, an index."""


def open_records(path: str) -> Records:
    """The records of a file, by the ending of its name, or of a folder of .parquet files.

    `tfds:NAME/CONFIG:SPLIT?data_dir=DIR` is a prepared data set of tensorflow-datasets,
    `shapes:...` are drawn pictures (`synthetic_records.py`).

    Raises:
      InputError: naming the file, and the place in it, that cannot be read.
    """
    if path.startswith(SCHEME):
        records = TfdsRecords(path)
    elif path.startswith(DRAWN):
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
        if not os.path.isfile(path):  # a pipe cannot be read at random
            raise InputError(f"{path}: not a file")
        records = kind(path)
    if not len(records):
        raise InputError(f"{path}: has no records")
    return records
