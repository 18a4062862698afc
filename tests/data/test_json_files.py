"""Records in JSON: each is found, whatever its text, and one that is broken spoils no other."""

import json
import pickle
import random

import pytest

from helpers.golden import raises
from neo_jax.data.record_files import open_records


def test_an_index_is_small(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"conversations": []}\n' * 5000)
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": []}] * 5000))
    for name in ("a.jsonl", "a.json"):
        assert len(pickle.dumps(open_records(str(tmp_path / name)))) < 8 * 5000 + 1000


def random_json(rng: random.Random, depth: int):
    kind = rng.randrange(7 if depth else 4)
    if kind < 2:
        return "".join(rng.choices('"\\[]{},: \n\té\u2028\U0001f600a', k=rng.randrange(9)))
    if kind < 4:
        return rng.choice([None, True, -1.5e-3, 10**30])
    if kind < 5:
        return [random_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {f'{n}"]{{,': random_json(rng, depth - 1) for n in range(rng.randrange(4))}


@pytest.mark.parametrize("seed", range(60))
def test_elements_of_any_array_are_found(seed, tmp_path):
    rng = random.Random(seed)
    wanted = [{"value": random_json(rng, 4)} for _ in range(rng.randrange(1, 9))]
    text = json.dumps(
        wanted,
        indent=rng.choice([None, 0, 2, "\t"]),
        separators=rng.choice([(",", ":"), (" , ", " : ")]),
        ensure_ascii=rng.random() < 0.5,
    )
    text = rng.choice(["", "\ufeff"]) + rng.choice(["", " \r\n"]) + text + rng.choice(["", "\n"])
    (tmp_path / "a.json").write_bytes(text.encode())
    records = open_records(str(tmp_path / "a.json"))
    found = [records[index] for index in range(len(records))]
    assert found == [r | {"conversations": None} for r in wanted]


def test_a_bad_element_spoils_no_other(tmp_path):
    (tmp_path / "a.json").write_text(
        '[{"id": 1}, 5, "],{", {"id": [1}}, , {"id": 2}, {"id" 3}, []]'
    )
    records = open_records(str(tmp_path / "a.json"))
    assert len(records) == 8
    assert (records[0]["id"], records[5]["id"]) == (1, 2)
    for index, expected in ((1, "not int"), (2, "not str"), (3, "JSON"), (4, "JSON"), (6, "JSON")):
        with raises(expected):
            records[index]
    with raises("not list"):
        records[7]


def test_a_bad_line_spoils_no_other(tmp_path):
    lines = [b'{"id": 1}', b'{"id": ', b"[1]", b'{"id": "\xff"}', b"[" * 100000, b'{"id": 2}']
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    records = open_records(str(tmp_path / "a.jsonl"))
    assert (records[0]["id"], records[5]["id"]) == (1, 2)
    for index, expected in (
        (1, "not JSON"),
        (2, "not list"),
        (3, "not JSON: .*utf-8"),
        (4, "not JSON"),
    ):
        with raises(expected):
            records[index]
