"""PT of NEO-ov 9B: give start=, data.mixture= and workdir= (`configs/stages.py`)."""

from neo_jax.configs.models import NEO_OV_9B
from neo_jax.configs.stages import pre_training
from neo_jax.train.train_config import Config

MODEL = NEO_OV_9B  # of the checkpoint that `start` names


def get_config() -> Config:
    return pre_training(MODEL)
