"""LoRA: the factors' change of a product counts however small it is, on every mesh."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from helpers.golden import load_case, raises
from helpers.training import packed
from neo_jax.batch import micro_batches
from neo_jax.collectives import shard_map_over_data
from neo_jax.model import layers, lora
from neo_jax.model.int8 import CONTRACTING_DIMS
from neo_jax.sharding import make_mesh, partition_spec, spec
from neo_jax.train import param_paths
from neo_jax.train.step import loss_and_gradients

SCALE = 0.5
SIZES = {"b": 8, "t": 256, "d": 128, "f": 128, "n": 4, "h": 32, "r": 4}
NAMES = {"b": "batch", "d": "embed", "f": "ffw", "n": "heads"}


def partition(letters):
    """The partition of an array with these dimensions; activations are not split over `embed`."""
    names = map(NAMES.get, letters)
    return partition_spec(*(None if "b" in letters and name == "embed" else name for name in names))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("equation", ["btd,dnh->btnh", "btd,df->btf", "btf,fd->btd"])
def test_a_change_below_the_rounding_of_a_weight_counts(shape, equation):
    """In bfloat16, a change of 1e-5 of weights of 0.02; on each device, as in training."""
    x_letters, letters, y_letters = equation.replace("->", ",").split(",")
    of_a, of_b = letters[0] + "r", "r" + letters[1:]
    mesh, random = make_mesh(shape), np.random.default_rng(0)

    def normal(letters, size, dtype):
        array = random.normal(0, size, [SIZES[letter] for letter in letters])
        return jax.device_put(array.astype(dtype), NamedSharding(mesh, partition(letters)))

    def products(x, weight):
        out = spec("batch", None, None) if y_letters == "btd" else None
        for matrix in (weight, weight.matrix):
            param = nnx.Param(matrix)
            param.set_metadata(out_sharding=partition(letters))
            yield layers.einsum(equation, x, param, out=out).astype("float32")

    x, matrix = normal(x_letters, 1, "bfloat16"), normal(letters, 0.02, "bfloat16")
    a, b = normal(of_a, 128**-0.5, "float32"), normal(of_b, 1e-5 * 32**0.5 / SCALE, "float32")
    weight, y = lora.LoraMatrix(matrix, a, b, SCALE), partition(y_letters)
    in_specs = (partition(x_letters), weight.partitions(partition(letters)))
    with jax.set_mesh(mesh):
        run = shard_map_over_data(lambda *arrays: tuple(products(*arrays)), in_specs, (y, y))
        changed, plain = map(np.asarray, jax.jit(run)(x, weight))
    wanted = SCALE * np.tensordot(np.asarray(x, np.float32) @ np.asarray(a), np.asarray(b), 1)
    share = np.sum((changed - plain) * wanted) / np.sum(wanted * wanted)
    assert share == pytest.approx(1, abs=0.05)  # the products' rounding is noise beside it


@functools.cache
def factors_and_gradients(shape, merge):
    neo = load_case("packed_train", shape)
    paths = [
        p
        for p in param_paths.all_paths(neo.params)
        if "/" in p and p.rpartition("/")[2] in CONTRACTING_DIMS
    ]
    with jax.set_mesh(neo.mesh):
        make = jax.jit(lambda params: lora.new_factors(params, paths, 2, jax.random.key(0)))
        random = np.random.default_rng(0)
        factors = jax.tree.map(
            lambda leaf: jax.device_put(0.1 * random.normal(size=leaf.shape), leaf.sharding),
            make(neo.params),
        )
        batch = micro_batches(packed(rows=4), 1, neo.mesh)
        run = functools.partial(loss_and_gradients, neo.config, remat="projections")
        merge = functools.partial(merge, scale=SCALE)
        return jax.jit(functools.partial(run, merge_params=merge))(factors, neo.params, batch)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2, 2)], ids=str)
def test_factors_count_as_if_they_were_merged(shape):
    """Loss and gradients equal those through the merged matrices."""
    loss, gradients = factors_and_gradients(shape, lora.with_lora)
    wanted, theirs = factors_and_gradients((1, 1, 1), lora.merge_lora)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    found = jax.tree_util.tree_leaves_with_path(gradients)
    assert len(found) == 2 * 2 * 9  # factors, stacks, matrices
    for (path, ours), other in zip(found, jax.tree.leaves(theirs), strict=True):
        largest = np.abs(other).max()
        assert largest > 0
        np.testing.assert_allclose(ours, other, atol=1e-4 * largest, err_msg=str(path))


def test_only_matrices_of_layers_have_factors():
    params = load_case("packed_train").params
    for path in ("embed", "patch_embed/merge_qed", "final_norm", "post_llm/mlp_norm"):
        with raises(f"lora.targets: {path} is not a matrix of a layer"):
            lora.new_factors(params, [path], 2, jax.random.key(0))
