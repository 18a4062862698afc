"""NEO-ov, the vision-language model without a vision encoder, in JAX for TPUs."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neo_jax.data.image import preprocess_image, smart_resize
    from neo_jax.errors import InputError
    from neo_jax.infer.api import Pipeline, load
    from neo_jax.infer.request import Request, Result
    from neo_jax.infer.sampling import Sampling
    from neo_jax.weights.export import save_hf

__all__ = [
    "InputError",
    "Pipeline",
    "Request",
    "Result",
    "Sampling",
    "load",
    "preprocess_image",
    "save_hf",
    "smart_resize",
]

_MODULES = {
    "InputError": "errors",
    "Pipeline": "infer.api",
    "Request": "infer.request",
    "Result": "infer.request",
    "Sampling": "infer.sampling",
    "load": "infer.api",
    "preprocess_image": "data.image",
    "save_hf": "weights.export",
    "smart_resize": "data.image",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: a command's help need not wait for JAX."""
    if name not in _MODULES:
        raise AttributeError(f"module 'neo_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"neo_jax.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
