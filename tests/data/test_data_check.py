"""`neo-ov data`: its counts, against those of an independent count here."""

import json
import random
import re
import sys

import numpy as np
import pytest
from PIL import Image

from helpers.commands import check_data as main
from helpers.golden import GOLDEN
from neo_jax.data.inspect_records import Measured, fill_of_rows
from neo_jax.data.supervised import Limits
from neo_jax.data.tokenizer import NeoTokenizer

MODEL = GOLDEN / "packed_train/hf"
LENGTH, SIDE = 120, 96  # tokens of a row; pixels of an image, which stays as it is


def conversation(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def data_set(tmp_path):
    """Two files: 30 records, of which every 5th is bad and every 7th too long."""
    Image.new("RGB", (SIDE, SIDE), "red").save(tmp_path / "a.png")
    rng, records = random.Random(0), []
    for number in range(30):
        images = ["a.png"] * rng.randrange(3)
        text = "a" * (200 if number % 7 == 0 else rng.randrange(30))
        record = {
            "images": images,
            "conversations": conversation("<image>" * len(images), text),
        }
        records.append({"conversations": []} if number % 5 == 0 else record)
    lines = [json.dumps(record) for record in records]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:13]))
    (tmp_path / "b.json").write_text(f"[{','.join(lines[13:])}]")
    return tmp_path, records


def recount(records) -> dict[str, int]:
    """What the command must print, from the texts alone."""
    tokenizer = NeoTokenizer.from_directory(MODEL)
    counts = dict.fromkeys(
        ("good", "bad", "too long", "tokens", "supervised", "images", "patches"), 0
    )
    for record in records:
        if not record["conversations"]:
            counts["bad"] += 1
            continue
        human, gpt = (turn["value"] for turn in record["conversations"])
        visual = "<img>" + "<IMG_CONTEXT>" * (SIDE // 32) ** 2 + "</img>"
        asked = f"<|im_start|>user\n{human.replace('<image>', visual)}<|im_end|>\n"
        supervised = len(tokenizer.encode(f"{gpt}<|im_end|>\n"))
        opening = len(tokenizer.encode("<|im_start|>assistant\n"))
        tokens = len(tokenizer.encode(asked)) + opening + supervised
        if tokens > LENGTH:
            counts["too long"] += 1
            continue
        counts["good"] += 1
        counts["tokens"] += tokens
        counts["supervised"] += supervised
        counts["images"] += human.count("<image>")
        counts["patches"] += human.count("<image>") * (SIDE // 16) ** 2
    return counts


def command(*arguments) -> list[str]:
    options = ["--tokenizer", str(MODEL), "--length", str(LENGTH), "--min-pixels", "1024"]
    return [*map(str, arguments), *options]


def printed(text: str) -> dict[str, int]:
    names = {"supervised tokens": "supervised"}
    found = re.findall(r"^([a-z ]+?)  +([\d,]+)$", text, re.MULTILINE)
    return {names.get(name, name): int(number.replace(",", "")) for name, number in found}


def test_counts_are_those_of_the_records(data_set, capsys):
    folder, records = data_set
    wanted = recount(records)
    assert wanted["good"] > 10 and wanted["bad"] == 6 and wanted["too long"] == 4
    bad, figure = folder / "bad.jsonl", folder / "o.png"
    files = [folder / "a.jsonl", f"{folder}/b.json%50"]
    assert main(command(*files, "--bad", bad, "--png", figure, "--show", 2)) == 1
    out, err = capsys.readouterr()
    assert printed(out) == wanted | {"records": 30}
    assert "30/30" in err
    assert f"\n{folder}/a.jsonl:1: has no list of conversations\n" in out
    assert "\n... and 8 more" in out
    for name in ("tokens", "patches"):
        bars = out.split(f"\n{name} per record\n")[1].split("\n\n")[0].splitlines()[:10]
        assert sum(int(bar.split()[-1].replace(",", "")) for bar in bars) == wanted["good"]
    lines = [json.loads(line) for line in bad.read_text().splitlines()]
    places = [
        f"{folder}/a.jsonl:{n + 1}" if n < 13 else f"{folder}/b.json[{n - 13}]" for n in range(30)
    ]
    numbers = [n for n in range(30) if n % 5 == 0 or n % 7 == 0]
    assert [line["number"] for line in lines] == numbers
    assert [line["place"] for line in lines] == [places[n] for n in numbers]
    assert [line["kind"] for line in lines] == ["too long" if n % 5 else "bad" for n in numbers]
    assert Image.open(figure).size[0] > 100


def test_workers_and_a_limit_give_the_same(data_set, capsys):
    folder, records = data_set
    assert (
        main(command(folder / "a.jsonl", folder / "b.json", "--limit", "10", "--workers", "2")) == 1
    )
    wanted = recount(records[::3])  # evenly spread
    assert printed(capsys.readouterr().out) == wanted | {"records": 10}


def test_code_0_when_none_is_bad(data_set, capsys):
    folder, records = data_set
    good = [json.dumps(record) for n, record in enumerate(records) if n % 5]  # some too long
    (folder / "c.jsonl").write_text("\n".join(good))
    (folder / "a.jsonl").write_text("broken")
    assert main(command(folder / "c.jsonl")) == 0
    assert printed(capsys.readouterr().out)["too long"] == 4


def test_bad_input_gives_one_line_and_code_2(data_set, capsys, monkeypatch):
    folder, _ = data_set
    good = folder / "a.jsonl"
    before = good.read_bytes()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for arguments, expected in (
        ([folder / "absent.jsonl"], "absent.jsonl: no such file"),
        ([good, "--tokenizer", "/absent"], "/absent"),
        ([good, "--bad", folder / "x/y"], "x/y: cannot write: No such file"),
        ([good, "--bad", good], "a.jsonl: has the records"),
        ([good, "--png", folder / "o.png"], r"o.png: this needs neo-ov-jax[plots]"),
    ):
        options = arguments if "--tokenizer" in arguments else command(*arguments)
        assert main([*map(str, options)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("neo-ov: ")
        assert expected in err
        assert err.count("\n") == 1
    assert good.read_bytes() == before


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "example: neo-ov data a.jsonl" in capsys.readouterr().out


def test_fill_of_rows_is_what_packing_gives():
    """Against grain's packer on arrays of these lengths, in the same order."""
    import grain

    rng = np.random.default_rng(1)
    limits = Limits(length=100, num_patches=60)
    sizes = [(int(t), int(p)) for t, p in rng.integers(1, (60, 30), (300, 2))]
    measured = [Measured(n, tokens=t, patches=p) for n, (t, p) in enumerate(sizes)]
    fill = fill_of_rows([*measured, Measured(300, 1, problem="bad")], limits, 8)
    order = np.random.default_rng(0).permutation(sizes)
    names = {f"t{n}": 100 for n in range(5)} | {f"p{n}": 60 for n in range(2)}
    elements = [
        {name: np.ones(t if name[0] == "t" else p, np.int8) for name in names} for t, p in order
    ]
    packed = grain.experimental.BestFitPackIterDataset(
        grain.MapDataset.source(elements).to_iter_dataset(),
        length_struct=names,
        num_packing_bins=8,
        shuffle_bins=False,
    )
    rows = list(packed)
    assert fill["rows"] == len(rows)
    assert fill["tokens"] == pytest.approx(sum(row["t0"].sum() for row in rows) / len(rows) / 100)
    assert fill["patches"] == pytest.approx(sum(row["p0"].sum() for row in rows) / len(rows) / 60)
