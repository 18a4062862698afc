"""Every benchmark of the table, from a file with one row to its headline metric."""

import pytest

from helpers import made_benchmarks as made
from neo_jax.eval import benchmarks, plots
from neo_jax.eval.run import Plan, evaluate
from neo_jax.infer.request import Result

ANSWERS = {"A": "A", "Yes": "yes"}  # by right answer
OWN_CELLS = {
    "vsi": {"question_type": "route_planning"},
    "spar": {"task": "position_matching"},
    "hallusion": {"index": "VD_figure_x_3_1_0", "answer": "Yes"},
    "pope": {"answer": "Yes"},
    "textvqa": {"answer": "['left', 'left', 'left', 'left']"},
    "mme": {"answer": "Yes", "category": "OCR"},
    "videommmu": {"question_type": "multiple-choice", "options": '["left", "right"]'},
}


@pytest.mark.parametrize("benchmark", benchmarks.TABLE, ids=lambda benchmark: benchmark.name)
def test_every_benchmark_asks_and_scores(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "draw", lambda parts, folder: [])  # for speed
    cells = {
        **{"index": "4", "id": "validation_Art_1", "qid": "Q0000001", "question": "Where?"},
        **{"candidates": "['left', 'right']", "answer": "A", "category": "c", "l2-category": "d"},
        **{"image": made.text64(4), "A": "left", "B": "right"},
        **{"video": "v", "subtitle_path": "none.json"},
        **{"question_type": "q", "task": "t", "data_source": "s", "correct_choice": "0"},
        **OWN_CELLS.get(benchmark.name, {}),
    }
    if benchmark.has_subtitles:
        line = '[{"timestamp": [0.0, 2.0], "text": "said"}]'
        (tmp_path / "none.json").write_text(line)
    if benchmark.ask_video is not None:
        del cells["image"]
        (tmp_path / "v").mkdir()
        (tmp_path / "v/0.png").write_bytes(made.encoded(4))
    made.write_table(tmp_path / f"{benchmark.files[0]}.tsv", list(cells), [list(cells.values())])
    asked = []

    def serve(requests):
        for number, request in enumerate(requests):
            asked.append(request)
            yield number, Result(ANSWERS.get(cells["answer"], "left"), (), "stop", {})

    (scored,) = evaluate(Plan(benchmark.name, tmp_path, tmp_path / "run"), {}, serve)
    assert not scored.problems
    assert [one.verdict.score for one in scored.scored_rows] == [1]
    assert "Where?" in asked[0].prompt
    assert asked[0].sampling.temperature == 0
    head = scored.metrics[0]
    points = {"ocrbench": 0.1, "mme": 200}
    assert head.value == pytest.approx(points.get(benchmark.name, 100))
