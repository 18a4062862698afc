"""Mixture: several sources of records, sampled at given rates or weights.

    a.jsonl%50,b.parquet      a rate: `a` is sampled half as often as its size asks for
    a.jsonl@1,b.parquet@2     weights: `b` is sampled twice as often as `a`, whatever their sizes

An endless pass samples each source in proportion to its number of records times its rate. If any
source has a weight, it samples in proportion to the weights; sources without one have weight 1.
Rates and weights do not go together. File names cannot contain commas.
"""

import dataclasses
import hashlib
import re
from collections.abc import Sequence

import grain
import numpy as np

from neo_jax.data.record_files import Records, open_records
from neo_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Source:
    """Records, and how often they are sampled."""

    records: Records
    rate: float = 1.0  # sampled in proportion to rate * number of records
    weight: float | None = None  # instead of a rate: sampled in proportion to the weight


class Mixture:
    """The records of all sources under one numbering, 0 .. len - 1, source after source."""

    def __init__(self, sources: Sequence[Source]):
        if not sources:
            raise InputError("data.mixture is empty: name a file of records")
        rated = [s.records.name for s in sources if s.rate != 1]
        weighed = [s.records.name for s in sources if s.weight is not None]
        if rated and weighed:
            raise InputError(
                f"data.mixture: {rated[0]} has a %, {weighed[0]} an @: weights (@) are shares of "
                "the mixture, % is of a source's own records; use one kind"
            )
        self.sources = tuple(sources)
        self._ends = np.cumsum([len(source.records) for source in sources])

    @classmethod
    def parse(cls, text: str) -> "Mixture":
        """Opens the files that a mixture's text names.

        Raises:
          InputError: naming the file or the rate that is wrong.
        """
        names = [name.strip() for name in text.split(",") if name.strip()]
        return cls([_parse(name) for name in names])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> dict:
        records, index = self._find(number)
        return records[index]

    def where(self, number: int) -> str:
        """The file of a record and its place there."""
        records, index = self._find(number)
        return records.where(index)

    def numbers(self, seed: int, repeat: bool) -> grain.MapDataset:
        """The order of record numbers: endless and shuffled in each epoch, or all of them once."""
        if not repeat:
            return grain.MapDataset.range(len(self))
        parts, shares, first = [], [], 0
        for place, (source, end) in enumerate(zip(self.sources, self._ends, strict=True)):
            part = grain.MapDataset.range(first, int(end))
            if not source.records.is_ordered:
                part = part.seed(seed + 7919 * place).shuffle()
            parts.append(part.repeat())
            shares.append(self._share(source))
            first = int(end)
        if len(parts) == 1:
            return parts[0]
        return grain.MapDataset.mix(parts, weights=np.array(shares) / sum(shares))

    def fingerprint(self) -> str:
        """A digest of the sources' names, sizes, rates and weights."""
        parts = [(s.records.name, len(s.records), s.rate, s.weight) for s in self.sources]
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

    def _share(self, source: Source) -> float:
        if any(other.weight is not None for other in self.sources):
            return 1.0 if source.weight is None else source.weight
        return source.rate * len(source.records)

    def _find(self, number: int) -> tuple[Records, int]:
        place = int(np.searchsorted(self._ends, number, side="right"))
        records = self.sources[place].records
        return records, int(number - self._ends[place] + len(records))


def _parse(name: str) -> Source:
    match = re.fullmatch(r"(.+?)(?:([%@])([0-9.]+))?", name)
    path, kind, text = match.groups()
    try:
        number = float(text) if kind else 1.0
    except ValueError:
        number = 0.0
    if number <= 0:
        raise InputError(f"data.mixture: {name!r}: what follows {kind} must be a number above 0")
    records = open_records(path)
    if kind == "@":
        return Source(records, weight=number)
    return Source(records, rate=number / 100 if kind else 1.0)
