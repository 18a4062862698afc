"""MT of NEO-ov 9B, from a checkpoint of the stage before: give start=, data.mixture= and workdir=."""

from configs.models import NEO_OV_9B
from configs.stages import mid_training
from neo_jax.train.config import Config


def get_config() -> Config:
    return mid_training(NEO_OV_9B)
