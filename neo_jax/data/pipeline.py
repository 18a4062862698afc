"""From files of records to packed batches on the host: the data pipeline, made of grain's parts.

    records ──shuffle, repeat──▶ mixture ──this process's share──▶ example ──pack──▶ rows ──▶ batch

Everything before packing is a pure function of a record's number and a seed. So the state of the
iterator is a few numbers, and a resumed run gets the same batches as one that was never stopped.

A record that cannot be used becomes an example without tokens that carries the record's number. It
is packed like any other, so each record is counted exactly once, whichever process reads it.
"""

import dataclasses

import grain
import numpy as np
from absl import flags

from neo_jax.data.mixture import Mixture
from neo_jax.data.supervised import Limits, TooLong, supervised_example
from neo_jax.data.tokenizer import NeoTokenizer
from neo_jax.errors import InputError
from neo_jax.model_config import PATCH_CHANNELS

MAX_SKIPPED = 64  # skipped records that a row can carry
BAD, TOO_LONG = 0, 1  # reasons to skip a record


@dataclasses.dataclass(frozen=True)
class DataConfig:
    mixture: str = ""  # files: "a.jsonl%50,b.parquet", "a.jsonl@1,b.parquet@2"; data/mixture.py
    length: int = 8192  # tokens of a row
    num_patches: int = 0  # patches of a row; 0: as many as its tokens could need, 4 each
    rows: int = 8  # of a step, in all hosts and micro-batches together
    min_pixels: int = 65536  # of an image
    max_pixels: int = 16777216  # of an image; n > 1 images get max(2 * max_pixels // n, min) each
    max_frames: int = 128  # of a video
    weights: str = "square"  # of n supervised tokens: 1/sqrt(n); "token": 1; "sample": 1/n
    too_long: str = "drop"  # examples longer than a row; or "shrink" their images until they fit
    max_bad_share: float = 0.05  # the run stops at a larger share of records that cannot be used
    workers: int = 0  # processes that prepare examples; 0: threads of this process
    packing_rows: int = 8  # open rows of the packer: more give fuller rows, and need more memory

    def limits(self) -> Limits:
        return Limits(
            length=self.length,
            num_patches=self.num_patches or 4 * self.length,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
            max_frames=self.max_frames,
            weights=self.weights,
            too_long=self.too_long,
        )


def batches(
    d: DataConfig,
    mixture: Mixture,
    tokenizer: NeoTokenizer,
    *,
    seed: int,
    shard: tuple[int, int] = (0, 1),
    repeat: bool = True,
) -> grain.IterDataset:
    """Packed host batches: the model's arrays (`batch.py`), and the numbers of their records.

    Two more arrays have 0 where they are padded:
      records  [B, n] int64     1 + the number in the mixture of each document's record
      skipped  [B, m, 2] int64  1 + the number of a skipped record, and the reason, BAD or TOO_LONG

    Args:
      shard: (index, count) of this process's share of the records (`sharding.data_shard`).
      repeat: endless epochs, each shuffled anew; else one epoch in order, whose last batch may have
        fewer rows.
    """
    index, count = shard
    if d.rows % count:
        raise InputError(f"data.rows is {d.rows}: use a multiple of the {count} shares of hosts")
    limits = d.limits()
    numbers = mixture.numbers(seed, repeat)[index::count]
    make = _MakeExample(mixture, tokenizer, limits)
    examples = (
        numbers.seed(seed)
        .random_map(make)
        .to_iter_dataset(
            grain.ReadOptions(num_threads=0 if d.workers else 4, prefetch_buffer_size=32)
        )
    )
    packed = grain.experimental.BestFitPackIterDataset(
        examples,
        length_struct=_lengths(limits),
        num_packing_bins=d.packing_rows,
        seed=seed,
        shuffle_bins=repeat,
        meta_features=[name for name in _lengths(limits) if name != "tokens"],
    ).map(_row)
    rows = packed.batch(d.rows // count, drop_remainder=repeat)
    if d.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags
        return rows.mp_prefetch(grain.MultiprocessingOptions(d.workers, per_worker_buffer_size=2))
    return grain.experimental.ThreadPrefetchIterDataset(rows, prefetch_buffer_size=2)


def explain(mixture: Mixture, tokenizer: NeoTokenizer, limits: Limits, number: int) -> str:
    """The file of a skipped record, its place there, and the reason why it was skipped."""
    try:
        supervised_example(mixture[number], tokenizer, limits, np.random.default_rng(number))
    except Exception as error:
        return f"{mixture.where(number)}: {error}"
    return f"{mixture.where(number)}: could not be read when it was needed"


@dataclasses.dataclass
class _MakeExample:
    """Makes the example of a record's number: an empty one if it cannot be used."""

    mixture: Mixture
    tokenizer: NeoTokenizer
    limits: Limits

    def __call__(self, number: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        mark = np.array([number + 1], np.int64)
        try:
            arrays = supervised_example(self.mixture[number], self.tokenizer, self.limits, rng)
        except Exception as error:  # damaged files make libraries raise anything
            reason = TOO_LONG if isinstance(error, TooLong) else BAD
            return _empty() | {"skipped": np.array([[number + 1, reason]], np.int64)}
        return arrays | {"records": mark, "skipped": np.zeros((0, 2), np.int64)}


def _empty() -> dict[str, np.ndarray]:
    return {
        "tokens": np.zeros(0, np.int32),
        "thw": np.zeros((0, 3), np.int32),
        "is_image": np.zeros(0, bool),
        "targets": np.zeros(0, np.int32),
        "weights": np.zeros(0, np.float32),
        "patches": np.zeros((0, PATCH_CHANNELS), np.uint8),
        "patch_hw": np.zeros((0, 2), np.int32),
        "records": np.zeros(0, np.int64),
    }


def _lengths(limits: Limits) -> dict[str, int]:
    tokens = dict.fromkeys(("tokens", "thw", "is_image", "targets", "weights"), limits.length)
    patches = dict.fromkeys(("patches", "patch_hw"), limits.num_patches)
    # The number of documents in a row is bounded as well; at 4 tokens each they still fill it.
    return tokens | patches | {"records": -(-limits.length // 4), "skipped": MAX_SKIPPED}


def _row(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [name for name in row if not name.startswith("tokens_")]
    return {name: row[name] for name in names} | {"segments": row["tokens_segment_ids"]}
