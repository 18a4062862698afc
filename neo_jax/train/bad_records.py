"""Bookkeeping of a run's records: how many were read, and which could not be used."""

import json
from collections import Counter
from collections.abc import Callable, Mapping

import jax
import numpy as np
from etils import epath

from neo_jax.data.mixture import Mixture
from neo_jax.data.pipeline import TOO_LONG, DataConfig, explain
from neo_jax.data.tokenizer import NeoTokenizer
from neo_jax.errors import InputError
from neo_jax.train.run_metrics import append_line

MAX_EXPLAINED = 1000  # bad or too long records whose reason is written down
MIN_RECORDS = 100  # before the share of bad ones can end the run


class BadRecords:
    """Counts records and writes down why one was skipped.

    Each process has its own counts and its own file, `bad_records_PROCESS.jsonl`.

    Attributes:
      counts: "records", and of these "bad" and "too long".
    """

    def __init__(
        self,
        d: DataConfig,
        mixture: Mixture,
        tokenizer: NeoTokenizer,
        workdir: epath.Path,
        log: Callable[[str], None],
    ):
        self._d, self._mixture, self._tokenizer, self._log = d, mixture, tokenizer, log
        self._file = workdir / f"bad_records_{jax.process_index()}.jsonl"
        self.counts: Counter = Counter()

    def count(self, batch: Mapping[str, np.ndarray]) -> None:
        """Counts the records of a host batch, used and skipped.

        Raises:
          InputError: when more than `data.max_bad_share` of all records are bad.
        """
        skipped = batch["skipped"][batch["skipped"][..., 0] > 0]
        self.counts["records"] += int((batch["records"] > 0).sum()) + len(skipped)
        for number, reason in skipped:
            kind = "too long" if reason == TOO_LONG else "bad"
            self.counts[kind] += 1
            if self.counts["too long"] + self.counts["bad"] <= MAX_EXPLAINED:
                self._write_down(int(number) - 1, kind)
        bad, records = self.counts["bad"], self.counts["records"]
        if records >= MIN_RECORDS and bad > self._d.max_bad_share * records:
            raise InputError(
                f"{bad} of {records} records cannot be used, more than data.max_bad_share="
                f"{self._d.max_bad_share} allows; the reasons are in {self._file}"
            )

    def _write_down(self, number: int, kind: str) -> None:
        why = explain(self._mixture, self._tokenizer, self._d.limits(), number)
        if kind == "bad":
            self._log(f"left out: {why}")
        append_line(self._file, json.dumps({"kind": kind, "why": why}))
