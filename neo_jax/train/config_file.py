"""Config files: Python with `get_config() -> Config`; what they need to run on a certain pod."""

import importlib.util
from pathlib import Path
from types import ModuleType

from neo_jax.errors import InputError
from neo_jax.train.config import Config, override

CONFIGS = Path(__file__).parents[2] / "configs"


def load(path: str) -> ModuleType:
    """The module at a path.

    Raises:
      InputError: when it is not there or has no get_config().
    """
    if not Path(path).is_file():
        known = ", ".join(sorted(str(path) for path in CONFIGS.glob("[a-z]*_*.py")))
        raise InputError(f"{path}: no such config; there are {known}")
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InputError(f"{path}: has no get_config()")
    return module


def on_pod(config: Config, path: str, pod: str) -> Config:
    """The config with the mesh, rows and rematerialisation that `configs/pods.py` has for a pod.

    Raises:
      InputError: for a config or a pod that is not in that table.
    """
    from configs.pods import PODS

    table = {name: settings for (stem, name), settings in PODS.items() if stem == Path(path).stem}
    if not table:
        raise InputError(f"{path}: configs/pods.py has no pods for it; give mesh= and data.rows=")
    if pod not in table:
        raise InputError(f"--pod {pod}: {path} has {', '.join(table)}")
    return override(config, table[pod])
