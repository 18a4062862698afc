"""Remat policies: the activations that they name are those that the program marks."""

import re

import jax
import numpy as np
import pytest

from helpers.golden import load_case
from neo_jax.batch import to_device
from neo_jax.model.decoder import SAVED_NAMES
from neo_jax.model.neo import bind


@pytest.mark.parametrize("attention", ["blockwise", "interpreted"])
def test_every_saved_name_is_marked_in_the_program(attention):
    """An activation that is not marked would be recomputed, without any error."""
    neo, length = load_case("text_only"), 128
    row = {
        "tokens": np.ones((1, length), np.int32),
        "segments": np.ones((1, length), np.int32),
        "thw": np.zeros((1, length, 3), np.int32),
        "is_image": np.zeros((1, length), bool),
        "patches": np.zeros((1, 0, 768), np.uint8),
        "patch_hw": np.zeros((1, 0, 2), np.int32),
    }
    with jax.set_mesh(neo.mesh):
        program = jax.make_jaxpr(
            lambda params, batch: bind(neo.config, params).features(batch, attention=attention)
        )(neo.params, to_device(row, neo.mesh))
    marked = set(re.findall(r"name\[name=(\w+)\]", str(program)))
    assert marked == set().union(*SAVED_NAMES.values())
