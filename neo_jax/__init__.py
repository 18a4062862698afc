"""NEO-ov, the vision-language model without a vision encoder, in JAX for TPUs."""

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
