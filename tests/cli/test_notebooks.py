"""The notebooks are clean: `make notebooks` executes them, which takes a minute."""

import json

import pytest

from helpers.golden import GOLDEN

NOTEBOOKS = sorted((GOLDEN.parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_outputs_and_its_code_is_python(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5
    for cell in code:
        assert not cell["outputs"] and cell["execution_count"] is None
        compile("".join(cell["source"]), path.name, "exec")


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["eval_colab", "finetune_colab"]
