"""Every test runs on 8 virtual CPU devices; checkpoints and programs are shared within a run."""

import sys
import tempfile
from pathlib import Path

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_prng_impl", "unsafe_rbg")
# Nothing outside the run is touched.
jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="neo_jax_tests_"))
sys.path.insert(0, str(Path(__file__).parent))  # so that tests import `helpers`

# They take minutes: begun last, one of them would keep a single worker busy at the end.
LONG = ("test_engine", "test_interval_attention", "test_training_numbers", "test_training_runs")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)
