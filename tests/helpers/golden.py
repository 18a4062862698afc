"""Golden data, tiny models loaded from it, and expected errors."""

import functools
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import neo_jax

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden"
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)


@functools.cache
def load_case(name: str, mesh: tuple[int, int, int] = (1, 1, 1), dtype: str = "float32"):
    return neo_jax.load(GOLDEN / name / "hf", dtype=dtype, mesh=mesh)


def arrays(*path: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN.joinpath(*path)) as file:
        return dict(file)


def read_json(*path: str):
    return json.loads(GOLDEN.joinpath(*path).read_text())


def raises(*parts: str):
    """InputError whose message has every one of `parts`, in any order."""
    pattern = "(?s)" + "".join(f"(?=.*{part})" for part in parts)
    return pytest.raises(neo_jax.InputError, match=pattern)
