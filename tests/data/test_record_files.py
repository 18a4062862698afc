"""Every kind of file gives the same records, and says where it is broken."""

import base64
import functools
import io
import json
import os
import pickle
import random
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from helpers.golden import raises
from neo_jax.data.record_files import open_records


def png(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), (number, 0, 0)).save(out, "PNG")
    return out.getvalue()


def turns(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


# What every file holds. Text has what JSON and a search for brackets could stumble over.
WANTED = [
    {"images": [], "conversations": turns('é "[{,', "\\]}\u2028\n")},
    {"images": [png(1)], "conversations": turns("<image>\nWhat?", "A \U0001f600.")},
    {"images": [png(2), png(3)], "conversations": turns("<image><image>", "") * 3},
] + [{"images": [png(n)], "conversations": turns("", f"{n}")} for n in range(4, 9)]


def embedded(record: dict) -> dict:
    images = [{"bytes": base64.b64encode(raw).decode()} for raw in record["images"]]
    return record | {"images": images}


def write_jsonl(folder):
    """Images as files; a blank line, and no end to the last."""
    lines = []
    for number, record in enumerate(WANTED):
        names = [f"{number}_{place}.png" for place in range(len(record["images"]))]
        for name, raw in zip(names, record["images"], strict=True):
            (folder / name).write_bytes(raw)
        lines.append(json.dumps(record | {"images": names}, ensure_ascii=number % 2 == 0))
    path = folder / "a.jsonl"
    path.write_text("\n \n".join(["\n".join(lines[:3]), "\n".join(lines[3:])]), encoding="utf-8")
    return path


def write_json(folder):
    (folder / "a.json").write_text(json.dumps([embedded(r) for r in WANTED], indent=1))
    return folder / "a.json"


def write_parquet(folder, records=WANTED, name="a.parquet", size=3):
    images = [[{"bytes": raw, "path": None} for raw in r["images"]] for r in records]
    columns = {
        "conversations": [r["conversations"] for r in records],
        "images": pa.array(
            images, pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        ),
        "unread": [1] * len(records),
    }
    pq.write_table(pa.table(columns), folder / name, row_group_size=size)
    return folder / name


def write_parts(folder):
    """A folder of parts: bytes as they are, conversations as text."""
    (folder / "parts").mkdir()
    write_parquet(folder / "parts", WANTED[:4], "0.parquet")
    columns = {
        "conversations": [json.dumps(r["conversations"]) for r in WANTED[4:]],
        "images": [r["images"] for r in WANTED[4:]],
    }
    pq.write_table(pa.table(columns), folder / "parts/1.parquet")
    return folder / "parts"


def write_array_record(folder):
    writer = ArrayRecordWriter(str(folder / "a.arrayrecord"), "group_size:1")
    for record in WANTED:
        writer.write(json.dumps(embedded(record)).encode())
    writer.close()
    return folder / "a.arrayrecord"


@functools.cache
def tfds_builder():
    import tensorflow_datasets as tfds

    class NeoRecords(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = tuple(map(tfds.core.BuilderConfig, ("turns", "text", "asked")))

        def _info(self):
            text = tfds.features.Text()
            own = {
                "turns": {"conversations": tfds.features.Sequence({"from": text, "value": text})},
                "text": {"conversations": text},
                "asked": {"question": text, "answers": tfds.features.Sequence(text)},
            }
            images = {"images": tfds.features.Sequence(tfds.features.Image())}
            features = tfds.features.FeaturesDict(own[self.builder_config.name] | images)
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, record in enumerate(WANTED):
                turns = record["conversations"]
                asked, answer = turns[0]["value"], turns[1]["value"]
                text = {"conversations": json.dumps(turns)}
                own = {"turns": {"conversations": turns}, "text": text}
                own["asked"] = {"question": asked, "answers": ["other", answer, answer]}
                yield number, own[self.builder_config.name] | {"images": record["images"]}

    return NeoRecords


def write_tfds(folder, config="turns"):
    builder = tfds_builder()(data_dir=str(folder), file_format="array_record", config=config)
    builder.download_and_prepare()
    return f"tfds:neo_records/{config}:train?data_dir={folder}"


WRITERS = {
    "jsonl": (write_jsonl, "/a.jsonl:5"),  # its fourth line is blank
    "json": (write_json, "/a.json[3]"),
    "parquet": (write_parquet, "/a.parquet[3]"),
    "parts": (write_parts, "/parts/0.parquet[3]"),
    "arrayrecord": (write_array_record, "/a.arrayrecord[3]"),
    "tfds": (write_tfds, "[3]"),
    "tfds text": (functools.partial(write_tfds, config="text"), "[3]"),
}


def seen(records) -> list[dict]:
    """All records, their images' files read."""

    def read(image):
        if isinstance(image, bytes):
            return image
        assert os.path.isabs(image)
        with open(image, "rb") as file:
            return file.read()

    found = [records[index] for index in range(len(records))]
    return [
        {"images": [read(p) for p in r["images"]], "conversations": r["conversations"]}
        for r in found
    ]


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_the_same_records(kind, tmp_path, monkeypatch):
    write, place = WRITERS[kind]
    path = str(write(tmp_path))
    monkeypatch.chdir(tmp_path)
    relative = path if path.startswith("tfds") else os.path.relpath(path)
    for records in (open_records(path), pickle.loads(pickle.dumps(open_records(relative)))):
        assert seen(records) == WANTED
    assert open_records(path).where(3).endswith(place)
    assert open_records(path).name == path
    assert "tensorflow" not in sys.modules


def test_a_place_counts_within_a_part_and_groups_are_read_in_any_order(tmp_path):
    records = open_records(str(write_parts(tmp_path)))
    assert records.where(4) == f"{tmp_path}/parts/1.parquet[0]"
    assert records.where(7) == f"{tmp_path}/parts/1.parquet[3]"
    order = random.Random(0).sample(range(8), 8)
    assert [seen([records[n]])[0] for n in order] == [WANTED[n] for n in order]


def test_question_and_most_frequent_answer_make_a_conversation(tmp_path):
    records = open_records(write_tfds(tmp_path, "asked"))
    assert seen(records) == [r | {"conversations": r["conversations"][:2]} for r in WANTED]


def test_a_picture_is_a_path_or_bytes_or_both(tmp_path):
    raw = base64.b64encode(b"x").decode()
    given = [
        ("p.png", f"{tmp_path}/p.png"),
        ("/p.png", "/p.png"),
        ({"bytes": None, "path": "p.png"}, f"{tmp_path}/p.png"),
        ({"bytes": raw, "path": "p.png"}, b"x"),
    ]
    lines = [json.dumps({"image": value, "video": [value], "id": 7}) for value, _ in given]
    wrong = [5, True, "", {}, {"bytes": 5}, {"bytes": "?"}, [None], [["p.png"]], {"path": None}]
    lines += [json.dumps({"images": value}) for value in wrong]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    records = open_records(str(tmp_path / "a.jsonl"))
    for index, (_, wanted) in enumerate(given):
        assert records[index] == {
            "image": wanted,
            "video": [wanted],
            "id": 7,
            "conversations": None,
        }
    for index, value in enumerate(wrong, len(given)):
        with raises("images: "):
            pytest.fail(f"{value}: {records[index]}")


BROKEN = {
    "none.jsonl": (None, "no such file"),
    "null\0.jsonl": (None, "no such file"),
    "none": (None, "not a file of records: use .jsonl"),
    "a.csv": (b"a,b", "not a file of records"),
    "empty.jsonl": (b"", "has no records"),
    "blank.jsonl": (b"\n \n", "has no records"),
    "empty.json": (b"", "is empty"),
    "blank.json": (b" \n", "must be a JSON array"),
    "none.json": (b"[ ]", "has no records"),
    "object.json": (b'{"id": 1}', "must be a JSON array of records, or name it .jsonl"),
    "text.json": (b'"[1]"', "must be a JSON array"),
    "cut.json": (b'[{"id": 1}, {"id": [2', r"cut off: \[1\], from byte 11, has no end"),
    "string.json": (b'[{"id": 1}, {"id": "2}]', r"cut off: \[1\], from byte 11"),
    "open.json": (b'[{"id": 1}', r"cut off: \[0\]"),
    "two.json": (b'[{"id": 1}]\n [2]', "goes on after the array's end, at byte 13"),
    "empty.parquet": (b"", "not a Parquet file"),
    "junk.parquet": (b"PAR1" + b"x" * 99, "not a Parquet file"),
    "empty.arrayrecord": (b"", "not an ArrayRecord file"),
    "junk.array_record": (b"x" * 200000, "not an ArrayRecord file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(name, tmp_path):
    content, expected = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with raises(f"^{tmp_path}/{name}: ", expected):
        open_records(f"{tmp_path}/{name}")


def test_folders_and_pipes_are_no_files(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with raises("a.jsonl: a folder without .parquet files"):
        open_records(str(tmp_path / "a.jsonl"))
    os.mkfifo(tmp_path / "b.jsonl")
    with raises("b.jsonl: not a file"):
        open_records(str(tmp_path / "b.jsonl"))


def test_a_parquet_file_must_have_conversations(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "image": ["b"]}), tmp_path / "a.parquet")
    with raises("a.parquet: has no column conversations, but text, image"):
        open_records(str(tmp_path / "a.parquet"))


def test_damage_after_opening_is_said(tmp_path):
    for path in (write_parquet(tmp_path, size=100), write_array_record(tmp_path)):
        records, whole = open_records(str(path)), bytearray(path.read_bytes())
        whole[4:] = bytes(len(whole) - 4)
        path.write_bytes(whole)
        with raises("cannot be read"):
            records[0]
    path = write_jsonl(tmp_path)
    records = open_records(str(path))
    path.unlink()
    with raises("a.jsonl: cannot read: No such file"):
        records[0]


def test_a_prepared_set_is_named_with_what_is_wrong(tmp_path):
    write_tfds(tmp_path, "text")
    known = f"data_dir={tmp_path}"
    for name, expected in (
        (f"tfds:absent?{known}", "Could not find dataset files for: absent"),
        (f"tfds:neo_records/absent?{known}", "Could not find dataset files"),
        (f"tfds:neo_records/text:test?{known}", "Unknown split 'test'"),
        (f"tfds:neo_records/text:train[?{known}", "Error parsing split"),
        ("tfds:", "write tfds:NAME"),
    ):
        with raises("^" + name.replace("?", r"\?").replace("[", r"\["), expected):
            open_records(name)
    part = open_records(f"tfds:neo_records/text:1.0.0:train[2:4]?{known}")
    assert seen(part) == WANTED[2:4]
