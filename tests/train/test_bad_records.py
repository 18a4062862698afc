"""Whatever is in a data set, training goes on: each record is used once, or skipped once."""

import contextlib
import dataclasses
import json
import random
import signal
from collections import Counter

import numpy as np
import pytest

from helpers.bad_records import GOOD, damaged_images, odd_images, odd_texts, turns, wrong_types
from helpers.golden import GOLDEN
from neo_jax.data.mixture import Mixture
from neo_jax.data.pipeline import TOO_LONG, DataConfig, batches, explain
from neo_jax.data.supervised import supervised_example
from neo_jax.data.tokenizer import NeoTokenizer

CONFIG = DataConfig(length=256, rows=4, min_pixels=1024, max_pixels=4096)
TOKENIZER = NeoTokenizer.from_directory(GOLDEN / "packed_train/hf")
pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, of damage


@dataclasses.dataclass
class Case:
    """A data set, and the outcome that each record must have."""

    mixture: Mixture
    names: list[str]  # of records
    outcomes: list


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    sources = (damaged_images(), odd_images(folder), wrong_types(), odd_texts())
    found = [one for source in sources for one in source]
    found += [
        (f"good {n}", {"conversations": turns("?", "a" * (n % 50))}, GOOD) for n in range(200)
    ]
    random.Random(0).shuffle(found)
    names, records, outcomes = zip(*found, strict=True)
    lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in records]
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    return Case(Mixture.parse(str(folder / "a.jsonl")), names, outcomes)


@contextlib.contextmanager
def within(seconds: int):
    """Fails what hangs."""

    def stop(*_):
        pytest.fail(f"takes more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def one_pass(case: Case, shard=(0, 1), workers=0):
    config = dataclasses.replace(CONFIG, workers=workers)
    with within(60):
        return list(batches(config, case.mixture, TOKENIZER, seed=0, shard=shard, repeat=False))


def counted(found) -> tuple[Counter, Counter]:
    """How often each record was used, and how often each (record, reason) was skipped."""
    used = np.concatenate([batch["records"].reshape(-1) for batch in found])
    skipped = np.concatenate([batch["skipped"].reshape(-1, 2) for batch in found])
    return (
        Counter((used[used > 0] - 1).tolist()),
        Counter((number - 1, why) for number, why in skipped.tolist() if number),
    )


def test_each_bad_record_is_skipped_once_and_each_good_one_used_once(case):
    assert sum(outcome != GOOD for outcome in case.outcomes) >= 500
    used, skipped = counted(one_pass(case))
    got = [[] for _ in case.names]
    for number, count in used.items():
        got[number] += [GOOD] * count
    for (number, why), count in skipped.items():
        got[number] += [why] * count
    wanted = [[outcome] for outcome in case.outcomes]
    differ = [name for name, a, b in zip(case.names, got, wanted, strict=True) if a != b]
    assert differ == []


def test_two_shares_are_one_pass_together(case):
    (used, skipped), (other_used, other_skipped) = (counted(one_pass(case, (n, 2))) for n in (0, 1))
    assert not used.keys() & other_used.keys()
    assert (used + other_used, skipped + other_skipped) == counted(one_pass(case))


def test_worker_processes_lose_nothing(case):
    assert counted(one_pass(case, workers=2)) == counted(one_pass(case))


def test_packing_loses_and_doubles_nothing(case):
    """Each document of a packed row equals the example of its record alone."""
    limits, rng, seen = CONFIG.limits(), np.random.default_rng(0), 0
    for batch in one_pass(case):
        for row in range(len(batch["tokens"])):
            segments, first = batch["segments"][row], 0
            documents = [number for number in np.unique(segments) if number]
            records = [number - 1 for number in batch["records"][row] if number]
            assert len(documents) == len(records)
            for document, number in zip(documents, records, strict=True):
                alone = supervised_example(case.mixture[number], TOKENIZER, limits, rng)
                place = segments == document
                for name in ("tokens", "targets", "weights", "thw", "is_image"):
                    np.testing.assert_array_equal(batch[name][row][place], alone[name])
                last = first + len(alone["patches"])
                for name in ("patches", "patch_hw"):
                    np.testing.assert_array_equal(batch[name][row][first:last], alone[name])
                first = last
                seen += 1
            assert not batch["weights"][row][segments == 0].any()
            assert not batch["patches"][row][first:].any()
    assert seen == sum(outcome == GOOD for outcome in case.outcomes)


def test_every_skipped_record_is_explained(case):
    limits = CONFIG.limits()
    with within(60):
        for number, (name, outcome) in enumerate(zip(case.names, case.outcomes, strict=True)):
            if outcome == GOOD:
                continue
            explanation = explain(case.mixture, TOKENIZER, limits, number)
            place, _, reason = explanation.partition(f":{number + 1}: ")
            assert place == case.mixture.sources[0].records.name, name
            assert reason, name
            assert "could not be read when it was needed" not in reason, name
            assert ("tokens and" in reason) == (outcome == TOO_LONG), name
