"""Row by row and in total, our scores are those of the official code (`golden/scores`)."""

import pytest

from helpers.golden import read_json
from neo_jax.eval.scoring import choice, free_text, matching, normalise, spatial, videos, yes_no
from neo_jax.eval.scoring.metrics import ScoredRow, overall
from neo_jax.eval.tables.rows import make_row

LETTERS = {"A": "x1", "B": "y1", "C": "z1", "D": "w1"}


def scored_rows(name, score_row):
    """The rows of a golden file with our verdicts."""
    found = []
    for line in read_json("scores", f"{name}.json")["rows"]:
        row, answer = make_row(line), matching.prediction_text(line["prediction"])
        found.append(ScoredRow(row, answer, score_row(row, answer)))
    return found


def total(name):
    return read_json("scores", f"{name}.json")["total"]


def values(metrics):
    assert all(
        not m.count or (m.low <= m.value + 1e-9 and m.value <= m.high + 1e-9) for m in metrics
    )
    return {metric.name: metric.value for metric in metrics}


def check_rows(found, *columns):
    """Checks each score against the golden one, in the first of the columns that the row has."""
    for one in found:
        column = next((column for column in columns if column in one.row), None)
        # MVBench: no prediction counts as right, and has no score.
        assert column or one.answer == matching.NO_ANSWER, one.row
        wanted = float(one.row[column]) if column else 1.0
        assert one.verdict.score == pytest.approx(wanted, abs=1e-12), one.row


def test_each_extractor_reads_what_the_official_one_reads():
    rows = read_json("scores", "extractors.json")["rows"]
    assert len(rows) == 146
    for text, *wanted in rows:
        assert [
            matching.option_letter(text, LETTERS) or False,
            matching.stated_letter(text) or False,
            matching.stated_number(text),
            matching.yes_or_no(text),
            matching.first_letter(text) or "",
            matching.first_letter(text, "ABCDE") or "",
            matching.without_punctuation(text),
            normalise.vqa_answer(text),
        ] == wanted, text


@pytest.mark.parametrize(
    ("name", "count"),
    [("AI2D_TEST", 25), ("BLINK", 25), ("MMStar", 32), ("RealWorldQA", 25), ("SEEDBench_IMG", 25)],
)
def test_multiple_choice(name, count):
    found = scored_rows(name, choice.score_row)
    assert len(found) == count
    check_rows(found, "hit")
    wanted = dict(total(name)[0])
    wanted.pop("split")
    got = values(choice.summarise(found))
    assert got == pytest.approx({key: 100 * value for key, value in wanted.items()})


def test_mmmu():
    found = scored_rows("MMMU_DEV_VAL", choice.score_mmmu)
    check_rows(found, "hit")
    metrics = choice.summarise(found, "validation")
    assert metrics[0].name == "validation: Overall"
    wanted = {
        f"{line['split']}: {key}": 100 * value
        for line in total("MMMU_DEV_VAL")
        for key, value in line.items()
        if key != "split" and value is not None
    }
    assert values(metrics) == pytest.approx(wanted)
    assert any(one.verdict.fault for one in found)


def test_circular_choice():
    found = scored_rows("MMBench_DEV_EN", choice.score_circular)
    wanted = total("MMBench_DEV_EN")
    groups = choice.circular_groups(found)
    assert {one.row["index"]: one.verdict.score for one in groups} == {
        line["index"]: line["hit"] for line in wanted["per_group"]
    }
    got = values(choice.summarise_circular(found))
    assert got.pop("rows, each order by itself") > got["Overall"]
    report = {k: 100 * v for k, v in wanted["report"][0].items() if k != "split"}
    assert got == pytest.approx(report)


def test_flipped_choice():
    found = scored_rows("3DSRBench", choice.score_3dsr)
    check_rows(found, "hit")
    got = values(choice.summarise_3dsr(found))
    names = ("vanilla", "flip", "circular", "flip and circular")
    for name, wanted in zip(names, total("3DSRBench"), strict=True):
        assert got.pop(name) == pytest.approx(100 * wanted["Overall"])
        for category in ("height", "location"):
            assert got.pop(f"{name}: {category}") == pytest.approx(100 * wanted[category])
    assert not got


def test_pope():
    found = scored_rows("POPE", yes_no.score_row)
    check_rows(found, "score")
    got = values(yes_no.summarise_pope(found))
    names = {"Overall": "F1", "acc": "accuracy", "precision": "precision", "recall": "recall"}
    wanted = {}
    for line in total("POPE"):
        prefix = "" if line["split"] == "Overall" else f"{line['split']}: "
        wanted |= {prefix + ours: line[theirs] for theirs, ours in names.items()}
    assert got == pytest.approx(wanted)


def test_hallusion():
    found = scored_rows("HallusionBench", yes_no.score_hallusion)
    check_rows(found, "score")
    got = values(yes_no.summarise_hallusion(found))
    wanted = {}
    for line in total("HallusionBench"):
        prefix = "" if line["split"] == "Overall" else f"{line['split']}: "
        wanted |= {prefix + name: line[name] for name in ("aAcc", "fAcc", "qAcc")}
    assert got.pop("average") == pytest.approx(
        (wanted["aAcc"] + wanted["fAcc"] + wanted["qAcc"]) / 3
    )
    assert got == pytest.approx(wanted)


def test_mme_adds_accuracies_of_rows_and_of_pairs():
    answers = {("existence", "1"): "Yn", ("existence", "2"): "yy", ("code_reasoning", "3"): "yN"}
    found = []
    for (category, image), letters in answers.items():
        for truth, letter in zip(("Yes", "No"), letters, strict=True):
            row = {"category": category, "question_id": image, "answer": truth}
            answer = "yes" if letter in "Yy" else "no"
            found.append(ScoredRow(row, answer, yes_no.score_mme(row, answer)))
    got = values(yes_no.summarise_mme(found))
    # existence: 3 of 4 rows and 1 of 2 pairs; code_reasoning: both rows and the pair.
    assert got == pytest.approx(
        {
            **{"total points": 325, "perception": 125, "reasoning": 200},
            **{"existence": 125, "code_reasoning": 200},
        }
    )


@pytest.mark.parametrize(
    ("name", "score_row"),
    [
        ("DocVQA_VAL", free_text.score_anls),
        ("ChartQA_TEST", free_text.score_relaxed),
        ("TextVQA_VAL", free_text.score_vqa),
    ],
)
def test_answers_in_words(name, score_row):
    found = scored_rows(name, score_row)
    check_rows(found, "hit")
    assert values(free_text.summarise(found)) == pytest.approx(total(name)[0])


def test_ocrbench():
    found = scored_rows("OCRBench", free_text.score_ocrbench)
    check_rows(found, "score")
    metrics = free_text.summarise_ocrbench(found)
    got = {name.split(" (")[0]: value for name, value in values(metrics).items()}
    assert got.pop("rows that are right") == pytest.approx(100 * 16 / 25)
    assert got == pytest.approx(total("OCRBench"))


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("EmbSpatialBench", "data_source"),
        ("MMSIBench_wo_circular", "category"),
        ("MUIRBench_EASI", "task"),
        ("MindCubeBench_tiny_raw_qa", "category"),
        ("ViewSpatialBench", "question_type"),
        ("OmniSpatialBench_manual_cot", "task_type"),
        ("MMSIVideoBench_50frame", "task_type"),
    ],
)
def test_letters_of_the_spatial_benchmarks(name, column):
    found = scored_rows(name, spatial.score_letter)
    check_rows(found, "hit")
    wanted = {k: v for k, v in total(name).items() if not k.startswith("tabulated")}
    got = values(overall(found, column, "sub_task_type"))
    for key, value in wanted.items():
        assert got[key.removesuffix("_accuracy").split("task_type.")[-1]] == pytest.approx(value)
    # Officially two unreadable texts are equal, so the row is right; the verdict names the fault.
    faults = [one for one in found if one.verdict.fault]
    assert all(one.verdict.score == 1 and one.verdict.parsed is None for one in faults)


def test_site_above_chance():
    found = scored_rows("SiteBenchImage", spatial.score_letter)
    check_rows(found, "hit")
    wanted = {k: v for k, v in total("SiteBenchImage").items() if not k.startswith("tabulated")}
    got = values(spatial.summarise_site(found))
    kinds = {"accuracy": ", accuracy", "caa": ", CAA"}
    for key, value in wanted.items():
        name, kind = key.rsplit("_", 1)
        assert got.pop(name + kinds[kind]) == pytest.approx(value)
    assert not got


def test_vsi():
    found = scored_rows("VSI-Bench", spatial.score_vsi)
    check_rows(found, "hit", "mra:.5:.95:.05")
    got = values(spatial.summarise_vsi(found))
    for key, value in total("VSI-Bench").items():
        if not key.startswith("tabulated"):
            name = key.removesuffix("_accuracy").removesuffix("_MRA:.5:.95:.05")
            assert got[name] == pytest.approx(value), key


def test_spar():
    found = scored_rows("SparBench", spatial.score_spar)
    check_rows(found, "hit", "mra:.5:.95:.05", "vci_metric")
    got = values(spatial.summarise_spar(found))
    suffixes = ("_accuracy", "_MRA:.5:.95:.05", "_vci_metric")
    for key, value in total("SparBench").items():
        for suffix in suffixes:
            key = key.removesuffix(suffix)
        assert got.pop(key) == pytest.approx(100 * value), key
    assert not got


@pytest.mark.parametrize(
    ("name", "score_row", "column"),
    [
        ("Video-MME", videos.score_letter, "duration"),
        ("LongVideoBench", videos.score_long_video, "duration_group"),
    ],
)
def test_first_letters_of_videos(name, score_row, column):
    found = scored_rows(name, score_row)
    check_rows(found, "score")
    got = {key: f"{value / 100:.3f}" for key, value in values(overall(found, column)).items()}
    assert got == total(name)


def test_lvbench():
    found = scored_rows("LVBench", videos.score_letter)
    check_rows(found, "score")
    assert overall(found)[0].value == pytest.approx(100 * total("LVBench")["correct_rate"])


def test_mvbench_counts_what_has_no_prediction_as_right():
    found = scored_rows("MVBench", videos.score_mvbench)
    check_rows(found, "score")
    got = values(overall(found, "task_type"))
    assert got == pytest.approx({k: 100 * v[0] / v[1] for k, v in total("MVBench").items()})
    assert "no prediction, which counts as right" in {one.verdict.fault for one in found}


def test_mlvu():
    found = scored_rows("MLVU_MCQ", videos.score_mlvu)
    check_rows(found, "score")
    got = values(overall(found, "task_type"))
    wanted = total("MLVU_MCQ")
    assert got.pop("overall") == pytest.approx(100 * sum(v[0] for v in wanted.values()) / 25)
    assert got == pytest.approx({key: 100 * right / all_ for key, (right, all_) in wanted.items()})


def test_video_mmmu():
    found = scored_rows("VideoMMMU", videos.score_video_mmmu)
    got = values(overall(found, "category", first="Overall"))
    wanted = total("VideoMMMU")
    assert got == pytest.approx({k: v["acc"] for k, v in wanted["file_based"].items()})
    by_id = {one.row["id"]: one.verdict for one in found}
    for line in wanted["per_row_in_memory"]:
        verdict = by_id[line["id"]]
        # The score that the official scorer would give if its file kept lists.
        assert bool(verdict.score or verdict.fault) == (line["correct"] == "Correct")
        if isinstance(line["parsed_pred"], str):
            assert (verdict.parsed or "No Answere Found") == line["parsed_pred"]
        else:
            assert verdict.parsed == sorted(map(str, line["parsed_pred"]))
