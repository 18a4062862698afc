"""Runs the notebooks from top to bottom with the tests' tiny models: `make notebooks`.

python notebooks/execute.py OUT
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]


def settings(out: Path) -> dict[str, dict[str, str]]:
    """What a notebook finds in its environment: a tiny model and little to do."""
    from helpers import made_benchmarks

    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    made_benchmarks.write_tsv(data, rows=24)
    golden = ROOT / "tests/golden"
    return {
        "eval_colab": {
            "NEO_MODEL": str(golden / "generate/hf"),
            **{"NEO_DATA": str(data), "NEO_RUN": str(out / "run"), "NEO_LIMIT": "24"},
            "NEO_SETTINGS": "max_new_tokens=4 min_pixels=1024 max_pixels=4096",
        },
        "finetune_colab": {
            "NEO_MODEL": str(golden / "packed_train/hf"),
            **{"NEO_WORK": str(out / "work"), "NEO_STEPS": "6", "NEO_LENGTH": "256"},
        },
    }


def main(out: Path) -> int:
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name, environment in settings(out).items():
        notebook = nbformat.read(HERE / f"{name}.ipynb", as_version=4)
        client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(HERE)}})
        client.execute(env={**os.environ, **environment})
        nbformat.write(notebook, out / f"{name}.ipynb")
        print(f"{name}: {len(notebook.cells)} cells, see {out / f'{name}.ipynb'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
