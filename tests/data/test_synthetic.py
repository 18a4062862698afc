"""Synthetic images: the same each time, held-out layouts apart, answers true of the pixels."""

import collections

import numpy as np
import pytest

from helpers.golden import raises
from neo_jax.data import synthetic
from neo_jax.data.mixture import Mixture
from neo_jax.data.supervised import Limits, supervised_example
from neo_jax.data.synthetic_records import ShapeRecords


def records_of(kind, count=150, is_held_out=False):
    return [synthetic.generate_record(kind, 5, number, is_held_out) for number in range(count)]


def answer(record, kind):
    return next(question.answer for question in record.questions if question.kind == kind)


def things(image):
    """[H, W] bool: what is not background, which is the colour of most pixels."""
    pixels = np.asarray(image).astype(int)
    colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    return np.abs(pixels - colours[counts.argmax()]).sum(axis=-1) > 60


def centre(image):
    rows, columns = np.nonzero(things(image))
    return np.array([(rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2])


def test_colour_and_place_are_true():
    for record in records_of("one"):
        image = record.images[0]
        colour = np.median(np.asarray(image)[things(image)], axis=0)
        assert tuple(colour.astype(int)) == synthetic.COLOURS[answer(record, "colour")]
        row, column = (centre(image) // synthetic.CELL).astype(int)
        assert answer(record, "place") == f"{synthetic.ROWS[row]} {synthetic.COLUMNS[column]}"


def test_counts_are_true():
    for record in records_of("count"):
        mask = things(record.images[0])
        cells = mask.reshape(3, synthetic.CELL, 3, synthetic.CELL).sum(axis=(1, 3))
        assert answer(record, "count") == str((cells > 60).sum())


def test_relations_bindings_and_motion_are_true():
    for record in records_of("two"):
        pixels = np.asarray(record.images[0])
        colours = [question.answer for question in record.questions if question.kind == "binding"]
        places = [
            np.mean(np.nonzero((pixels == synthetic.COLOURS[colour]).all(axis=-1)), axis=1)
            for colour in colours
        ]
        down, right = places[0] - places[1]
        if abs(right) > abs(down):
            wanted = "right" if right > 0 else "left"
        else:
            wanted = "below" if down > 0 else "above"
        assert answer(record, "relation") == wanted
    for record in records_of("motion", 60):
        down, right = centre(record.images[-1]) - centre(record.images[0])
        ways = {"left": -right, "right": right, "up": -down, "down": down}
        assert answer(record, "motion") == max(ways, key=ways.get)


def test_changes_are_true():
    for record in records_of("change"):
        before, after = (np.asarray(image) for image in record.images)
        masks = [things(image) for image in record.images]
        if (before == after).all():
            wanted = "nothing"
        elif (masks[0] == masks[1]).all():
            wanted = "the colour"
        else:
            cells = [tuple(centre(image) // synthetic.CELL) for image in record.images]
            wanted = "the shape" if cells[0] == cells[1] else "the place"
        assert answer(record, "change") == wanted


@pytest.mark.parametrize("kind", synthetic.kinds())
def test_no_picture_that_is_held_out_is_trained_on(kind):
    def contents(is_held_out):
        records = records_of(kind, 300, is_held_out)
        return {tuple(np.asarray(p).tobytes() for p in record.images) for record in records}

    assert not contents(True) & contents(False)
    assert len(contents(True)) > 250  # endless, not a few again and again


def test_records_are_the_same_each_time_and_fit_their_curriculum():
    tokenizer, limits = synthetic.tokenizer(), Limits(256, 384, 4096, 65536)
    for index in (0, 7, 9000, 9001, 50_000):
        one, two = (ShapeRecords("shapes:short")[index] for _ in range(2))
        examples = [
            supervised_example(record, tokenizer, limits, np.random.default_rng(0))
            for record in (one, two)
        ]
        for name, array in examples[0].items():
            np.testing.assert_array_equal(array, examples[1][name])
    records = ShapeRecords("shapes:short")
    changes = [
        "What changed?" in str(records[index]["conversations"]) for index in range(7900, 8100)
    ]
    assert not any(changes[:100])  # two images come after the first 8000 records
    assert any(changes[100:])
    with raises("shapes:all: use shapes:short"):
        ShapeRecords("shapes:all")


def numbers(mixture, count):
    order = mixture.numbers(seed=1, repeat=True)
    return [int(order[index]) for index in range(count)]


def test_a_mixture_draws_each_source_as_often_as_asked(tmp_path):
    for name, count in (("a", 100), ("b", 300)):
        lines = '{"conversations": []}\n' * count
        (tmp_path / f"{name}.jsonl").write_text(lines)
    a, b = (tmp_path / f"{name}.jsonl" for name in "ab")
    for text, share in ((f"{a},{b}", 1 / 4), (f"{a},{b}%50", 2 / 5), (f"{a}@3,{b}", 3 / 4)):
        found = numbers(Mixture.parse(text), 800)
        assert sum(number < 100 for number in found) / 800 == pytest.approx(share, abs=0.01)
    both = Mixture.parse(f"{a},{b}")
    assert collections.Counter(numbers(Mixture.parse(str(a)), 300)) == dict.fromkeys(range(100), 3)
    once = both.numbers(seed=1, repeat=False)
    assert [int(once[index]) for index in range(len(once))] == list(range(400))
    assert (both.where(99), both.where(100)) == (f"{a}:100", f"{b}:1")
    with raises("b.jsonl%x|%0"):
        Mixture.parse(f"{b}%0")
    with raises("mixture is empty"):
        Mixture.parse(" , ")
