"""PT of NEO-ov 9B, from a grown Qwen3 (convert.from_qwen3): give start=, data.mixture= and workdir=."""

from configs.models import NEO_OV_9B
from configs.stages import pre_training
from neo_jax.train.config import Config


def get_config() -> Config:
    return pre_training(NEO_OV_9B)
