"""A row of the key table: the example of its docstring, parts of it, and both directions."""

import doctest

import numpy as np
import pytest

from neo_jax.weights import row as row_module
from neo_jax.weights.row import Row

SIZES, CHANNELS = {"k": 2, "h": 4, "d": 2}, np.array([0, 2, 1, 3])  # H1 H2 W1 W2 -> H1 W1 H2 W2
ROW = Row(("k_hw_dkh",), "k_proj_hw.weight", "(k h) d", "d k h", SIZES, "h", CHANNELS)
TENSOR = np.arange(16).reshape(8, 2)


def _read(index):
    out = np.empty((2, 2, 4), int)[index]
    ROW.read(TENSOR.__getitem__, index, out)
    return out


def test_the_example_of_a_row_is_true():
    found = [test for test in doctest.DocTestFinder().find(Row.read, "read") if test.examples]
    for test in found:
        test.globs |= vars(row_module)
        assert doctest.DocTestRunner().run(test).failed == 0
    assert [len(test.examples) for test in found] == [7]


def test_a_row_moves_every_channel_to_its_place():
    whole = _read(np.index_exp[:, :, :])
    for d in range(2):
        for k in range(2):
            assert whole[d, k].tolist() == [TENSOR[4 * k + channel, d] for channel in (0, 2, 1, 3)]
    back = np.zeros_like(TENSOR)
    ROW.write(whole, back)
    np.testing.assert_array_equal(back, TENSOR)


@pytest.mark.parametrize("index", [np.index_exp[1:, :, :], np.index_exp[:, 1:, 1:3]])
def test_a_part_of_a_parameter_is_that_part_of_the_whole(index):
    np.testing.assert_array_equal(_read(index), _read(np.index_exp[:, :, :])[index])


def test_only_the_heads_and_columns_of_a_part_are_read():
    asked = []

    def get(index):
        asked.append(index)
        return TENSOR[index]

    ROW.read(get, np.index_exp[:1, 1:, :], np.empty((1, 1, 4), int))
    assert asked == [(slice(4, 8), slice(0, 1))]
