"""Every test runs on 8 virtual CPU devices; checkpoints and programs are shared within a run."""

import functools
import importlib.util
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_prng_impl", "unsafe_rbg")
# Nothing outside the run is touched.
jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="neo_jax_tests_"))

import neo_jax  # noqa: E402  (devices first)

GOLDEN = Path(__file__).parent / "golden"
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


# They take minutes: begun last, one of them would keep a single worker busy at the end.
LONG = ("test_engine", "test_kernels", "test_training_numbers", "test_training_runs")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)
