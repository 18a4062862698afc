"""Shared by tests of training: a tiny run, and the documents of the golden files in rows."""

import functools
import json

import numpy as np

from helpers.golden import GOLDEN, load_case
from neo_jax.data.mixture import Mixture
from neo_jax.data.pipeline import DataConfig
from neo_jax.data.supervised import Limits, supervised_example
from neo_jax.train.optimizer import OptimConfig
from neo_jax.train.train_config import Config

DOCUMENTS = Mixture.parse(str(GOLDEN / "packed_train/data.jsonl"))
GOLDEN_RUN = GOLDEN / "packed_train"
CONFIG = Config(
    start=str(GOLDEN_RUN / "hf"),
    data=DataConfig(
        mixture=str(GOLDEN_RUN / "data.jsonl"), length=192, num_patches=256, rows=8,
        min_pixels=4096, max_pixels=16384, packing_rows=8,
    ),
    optim=OptimConfig(peak_lr=1e-3, min_lr_ratio=1.0, ema=0.5),
    steps=6, dtype="float32", mesh=(1, 1, 1), remat="none", log_every=1, save_every=2,
)  # fmt: skip


def losses(workdir):
    """The loss of each step in `metrics.jsonl`."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@functools.cache
def document(number, weights="square"):
    tokenizer = load_case("packed_train").tokenizer
    limits = Limits(311, 4 * 311, 4096, 16384, weights=weights)
    return supervised_example(DOCUMENTS[number], tokenizer, limits, np.random.default_rng(0))


@functools.cache
def packed(weights="square", rows=1):
    """The four golden documents, all in one row, in order; or each in a row of its own."""
    documents = [document(number, weights) for number in range(4)]
    if rows == 1:
        row = {name: np.concatenate([d[name] for d in documents]) for name in documents[0]}
        lengths = [len(d["tokens"]) for d in documents]
        row["segments"] = np.repeat(np.arange(1, 5, dtype=np.int32), lengths)
        return {name: array[None] for name, array in row.items()}
    found = {}
    for name, first in documents[0].items():
        size = max(len(d[name]) for d in documents)
        size += -size % 32  # so that 8 devices can have a part of a row each
        found[name] = np.zeros((rows, size, *first.shape[1:]), first.dtype)
        for row, d in zip(found[name], documents, strict=False):
            row[: len(d[name])] = d[name]
    found["segments"] = np.zeros(found["tokens"].shape, np.int32)
    for row, d in zip(found["segments"], documents, strict=False):
        row[: len(d["tokens"])] = 1
    return found
