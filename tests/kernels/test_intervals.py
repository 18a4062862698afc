"""The attention mask, drawn."""

import re

import jax
import numpy as np

from neo_jax.kernels import intervals
from neo_jax.kernels.dense import interval_mask


def test_the_drawn_mask_is_what_the_function_computes():
    """Reads the matrix, T positions, segments and bounds from the module's docstring."""
    drawn = intervals.__doc__
    (segments, t) = (
        np.array([re.search(rf"^ +{name}((?:  \d)+)", drawn, re.M)[1].split()], np.int32)
        for name in ("segment", "T")
    )
    rows = re.findall(r"^(?:    query)? +[a-z<>-]((?:  [1.])+) +(\d+) +(\d+)$", drawn, re.M)
    mask, start, end = zip(*((row.split(), int(a), int(b)) for row, a, b in rows), strict=True)
    found = jax.jit(intervals.intervals)(t, segments)
    np.testing.assert_array_equal(found, [[start], [end]])
    np.testing.assert_array_equal(interval_mask(*found, t.shape[1])[0], np.array(mask) == "1")
