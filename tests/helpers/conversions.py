"""Runs converters and compares the tensors of published directories, bit by bit."""

from neo_jax.weights.tensor_files import open_tensors


def run(command, *arguments):
    """Runs a function of `helpers.commands`, which must succeed."""
    assert command(arguments) == 0


def all_tensors(directory):
    """Every tensor of a published directory, by key."""
    return {
        key: tensor[(slice(None),) * len(tensor.shape)]
        for key, tensor in open_tensors(directory).items()
    }


def assert_same_tensors(one, other):
    one, other = all_tensors(one), all_tensors(other)
    assert one.keys() == other.keys()
    for key, array in one.items():
        assert array.dtype == other[key].dtype
        assert array.tobytes() == other[key].tobytes(), key
