"""The default config for longer: until the model learns two objects and their relation.

It has 2.3 times as many steps, and a curriculum that ends with mostly two objects.
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
