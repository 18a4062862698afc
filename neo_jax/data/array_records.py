"""Records as ArrayRecord files: each entry is the JSON of a record, with its images in base64.

Write them with `group_size:1`: then a single record can be read at a time.
"""

import os

from neo_jax.data.record import make_record, parse_json, require
from neo_jax.errors import InputError


class ArrayRecords:
    is_ordered = False

    def __init__(self, path: str):
        self.name, self._folder = path, os.path.dirname(os.path.abspath(path))
        module = require("array_record.python.array_record_data_source", "array_record", path)
        try:
            # It reopens the file in each process.
            self._source = module.ArrayRecordDataSource(path)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{path}: not an ArrayRecord file, or damaged: {error}") from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        try:
            raw = self._source[index]
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"cannot be read: {error}") from error
        return make_record(parse_json(raw), self._folder)

    def where(self, index: int) -> str:
        return f"{self.name}[{index}]"
