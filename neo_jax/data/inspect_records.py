"""Checks a mixture before a run: tokens, patches and errors of every record, as in training."""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
from collections.abc import Iterator, Sequence

import numpy as np

from neo_jax.data.mixture import Mixture
from neo_jax.data.record import require
from neo_jax.data.supervised import Limits, TooLong, supervised_example
from neo_jax.data.tokenizer import NeoTokenizer
from neo_jax.errors import InputError

BINS = 10  # of a histogram
BAR = 40  # characters


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """The size of a record, or the reason why it cannot be used."""

    number: int  # in the mixture
    tokens: int = 0
    supervised: int = 0  # of them
    images: int = 0  # frames of videos too
    patches: int = 0
    problem: str = ""
    is_too_long: bool = False  # this is its only problem


def measure_records(
    mixture: Mixture,
    tokenizer: NeoTokenizer,
    limits: Limits,
    *,
    most: int | None = None,
    workers: int = 0,
) -> tuple[int, Iterator[Measured]]:
    """The number of records that are measured, and an iterator of their sizes, in order.

    Args:
      most: how many records to measure, evenly spread over the mixture; None: all.
      workers: the number of worker processes; 0: measure in this process.
    """
    count = len(mixture) if most is None else min(most, len(mixture))
    numbers = (index * len(mixture) // count for index in range(count))
    work = functools.partial(_measure, mixture, tokenizer, limits)
    return count, _in_workers(work, numbers, workers) if workers else map(work, numbers)


def fill_of_rows(measured: Sequence[Measured], limits: Limits, bins: int) -> dict[str, float]:
    """The rows that good records fill, and the share of their tokens and patches in use.

    Packs as training does: into `bins` open rows, each record where it fits best. As soon as a
    record fits into none of them, all are closed.
    """
    room = np.array([limits.length, limits.num_patches])
    sizes = np.array([(one.tokens, one.patches) for one in measured if not one.problem])
    rows, used = 0, np.zeros((bins, 2), np.int64)
    for size in np.random.default_rng(0).permutation(sizes):
        fits = (used + size <= room).all(axis=1)
        if not fits.any():
            rows += bins
            used[:], fits[:] = 0, True
        # grain sums the use of all arrays: five of tokens, two of patches.
        used[np.argmax(np.where(fits, used @ (5, 2), -1))] += size
    rows += np.count_nonzero(used.any(axis=1))
    shares = sizes.reshape(-1, 2).sum(axis=0) / np.maximum(rows * room, 1)
    return {"rows": int(rows), "tokens": float(shares[0]), "patches": float(shares[1])}


def summary(measured: Sequence[Measured], limits: Limits, bins: int) -> str:
    """Counts, totals, the fill of rows, and histograms, as lines of text."""
    good = [one for one in measured if not one.problem]
    long = sum(one.is_too_long for one in measured)
    fill = fill_of_rows(measured, limits, bins)
    lines = [
        f"records             {len(measured):>14,}",
        f"good                {len(good):>14,}",
        f"bad                 {len(measured) - len(good) - long:>14,}",
        f"too long            {long:>14,}",
    ]
    names = {"tokens": "tokens", "supervised": "supervised tokens"}
    for name, title in (names | {"images": "images", "patches": "patches"}).items():
        lines.append(f"{title:<20}{sum(getattr(one, name) for one in good):>14,}")
    lines.append(
        f"rows of {limits.length:,} tokens and {limits.num_patches:,} patches: {fill['rows']:,}; "
        f"full to {fill['tokens']:.1%} of tokens, {fill['patches']:.1%} of patches"
    )
    for name in ("tokens", "patches"):
        lines += ["", f"{name} per record", *_histogram([getattr(one, name) for one in good])]
    return "\n".join(lines)


def draw(measured: Sequence[Measured], path: str) -> None:
    """Histograms of tokens and patches per record, as a PNG."""
    figure = require("matplotlib.figure", "neo-ov-jax[plots]", path).Figure(
        figsize=(10, 4), layout="constrained"
    )
    for axes, name in zip(figure.subplots(1, 2), ("tokens", "patches"), strict=True):
        axes.hist([getattr(one, name) for one in measured if not one.problem], bins=50)
        axes.set(xlabel=f"{name} per record", ylabel="records")
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror}") from error


def _measure(mixture: Mixture, tokenizer: NeoTokenizer, limits: Limits, number: int) -> Measured:
    try:
        arrays = supervised_example(
            mixture[number], tokenizer, limits, np.random.default_rng(number)
        )
    except Exception as error:  # as in training: damaged files make libraries raise anything
        problem = str(error) or type(error).__name__
        return Measured(number, problem=problem, is_too_long=isinstance(error, TooLong))
    is_image = arrays["is_image"]
    return Measured(
        number,
        tokens=len(is_image),
        supervised=int(np.count_nonzero(arrays["weights"])),
        images=int(np.count_nonzero(np.diff(is_image.astype(np.int8), prepend=0) == 1)),
        patches=len(arrays["patches"]),
    )


def _in_workers(work, numbers, workers: int) -> Iterator[Measured]:
    # Not fork: a child would hold locks of threads that it does not have.
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(
            workers, mp_context=context, initializer=_set_work, initargs=(work,)
        ) as pool:
            yield from pool.map(_run_work, numbers, chunksize=16)
    except concurrent.futures.BrokenExecutor as error:
        raise InputError(
            "a worker process died, perhaps for memory: use fewer --workers"
        ) from error


def _set_work(work) -> None:
    """Keeps the mixture in a worker, so that it is sent only once."""
    global _work
    _work = work


def _run_work(number: int) -> Measured:
    return _work(number)


def _histogram(values: Sequence[int]) -> list[str]:
    if not values:
        return ["(none)"]
    step = max(values) // BINS + 1
    counts = np.bincount(np.array(values) // step, minlength=BINS)
    width = len(f"{step * BINS:,}")
    return [
        f"{place * step:>{width},} to {(place + 1) * step - 1:>{width},} "
        f"{'#' * -(-int(count) * BAR // int(counts.max())):<{BAR}} {count:,}"
        for place, count in enumerate(counts)
    ]
