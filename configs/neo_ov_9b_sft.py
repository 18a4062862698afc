"""SFT of NEO-ov 9B, from a checkpoint of the stage before: give start=, data.mixture= and workdir=."""

from configs.models import NEO_OV_9B
from configs.stages import fine_tuning
from neo_jax.train.config import Config


def get_config() -> Config:
    return fine_tuning(NEO_OV_9B)
