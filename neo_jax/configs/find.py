"""Finds a config by its file or name, and its settings for a pod."""

import importlib.util
from pathlib import Path
from types import ModuleType

from neo_jax.configs.pods import PODS
from neo_jax.errors import InputError
from neo_jax.train.train_config import Config, override

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("[a-z]*_*.py")))


def find_config(name: str) -> ModuleType:
    """The module of a config: a Python file with `get_config() -> Config`, or one of NAMES.

    Raises:
      InputError: if there is no such file, or it has no get_config().
    """
    path = FOLDER / f"{name}.py" if name in NAMES else Path(name)
    if not path.is_file():
        raise InputError(f"{name}: no such config; give a file, or one of {', '.join(NAMES)}")
    spec = importlib.util.spec_from_file_location("config", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{name}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InputError(f"{name}: has no get_config()")
    return module


def on_pod(config: Config, name: str, pod: str) -> Config:
    """The config with the mesh, rows and rematerialisation of a pod, from `configs/pods.py`.

    Raises:
      InputError: for a config or a pod that the table does not have.
    """
    table = {p: settings for (stem, p), settings in PODS.items() if stem == Path(name).stem}
    if not table:
        raise InputError(f"{name}: configs/pods.py has no pods for it; give mesh= and data.rows=")
    if pod not in table:
        raise InputError(f"--pod {pod}: {name} has {', '.join(table)}")
    return override(config, table[pod])
