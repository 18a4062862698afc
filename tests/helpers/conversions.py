"""What tests of conversions share."""

from neo_jax.weights.tensor_files import open_tensors


def run(command, *arguments):
    assert command(arguments) == 0


def all_tensors(directory):
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
