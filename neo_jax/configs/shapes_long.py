"""The embedded default for longer: until two things and how they stand to each other are learnt.

Two and a half times as many steps, and a curriculum that comes to mostly two things.
"""

import dataclasses

from neo_jax.configs import tiny_shapes
from neo_jax.train.train_config import Config

after = tiny_shapes.after


def get_config() -> Config:
    c = tiny_shapes.get_config()
    return dataclasses.replace(
        c,
        workdir="runs/shapes_long",
        data=dataclasses.replace(c.data, mixture="shapes:long"),
        steps=1500,
    )
