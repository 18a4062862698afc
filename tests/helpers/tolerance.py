"""How near two arrays must be: relative to the largest element, so that the processor is no matter.

An element near 0 is a sum of terms as large as the others', and has their rounding errors.
"""

import jax
import numpy as np


def assert_close(found, wanted, tolerance: float, least: float = 0.0) -> None:
    """max |found - wanted| <= tolerance * max |wanted|, of arrays or of each array of trees.

    Args:
      least: the size of the terms that cancel where all of `wanted` is near 0; taken in place of
        its largest element where that is smaller.
    """
    jax.tree.map(lambda one, other: _assert_close(one, other, tolerance, least), found, wanted)


def _assert_close(found, wanted, tolerance: float, least: float) -> None:
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    largest = np.max(np.abs(wanted), initial=least)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * largest)
