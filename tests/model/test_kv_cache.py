"""What is written to the pool, and read from it, against the same in numpy."""

import functools

import jax
import numpy as np
import pytest

from neo_jax.configs import models
from neo_jax.model import kv_cache as kv
from neo_jax.model.layer_stack import UnstackedLayers
from neo_jax.model.neo import abstract_params
from neo_jax.sharding import batch_rows, make_mesh, put

L, NUM_BLOCKS, SIZE, K = 2, 6, 128, 2
WIDTHS = {"k": 256, "v": 128}
KINDS = pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
KERNELS = pytest.mark.parametrize("kernel", [None, True], ids=["xla", "kernel"])
MESHES = pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 2)], ids=str)


def random_stores(rng, mesh, kv_dtype):
    """Stores full of numbers, on the host."""
    blocks, stores = NUM_BLOCKS * batch_rows(mesh), {}
    for which, width in WIDTHS.items():
        shape = (L, blocks, SIZE, K * width)
        if kv_dtype == "int8":
            scale = rng.random((L, blocks, K, SIZE)).astype(np.float32)
            stores[which] = {"values": rng.integers(-127, 128, shape).astype(np.int8)}
            stores[which]["scale"] = scale
        else:
            stores[which] = {"values": np.asarray(rng.normal(size=shape), kv_dtype)}
    return stores


def placed(stores, mesh):
    return jax.tree.map(
        lambda array, of_array: jax.device_put(array, jax.NamedSharding(mesh, of_array)),
        stores,
        kv.partition(stores),
    )


def encoded(new, kv_dtype):
    """[..., K, width] -> values [..., K * width] and scale [..., K], as the cache has them."""
    if kv_dtype != "int8":
        return np.asarray(new.reshape(*new.shape[:-2], -1), kv_dtype), None
    scale = np.abs(new).max(-1) / np.float32(127)
    values = np.round(new / scale[..., None]).astype(np.int8)
    return values.reshape(*new.shape[:-2], -1), scale


def write(stores, which, layer, block, place, new, kv_dtype):
    """A token [K, width] into numpy stores."""
    values, scale = encoded(new, kv_dtype)
    stores[which]["values"][layer, block, place] = values
    if scale is not None:
        stores[which]["scale"][layer, block, :, place] = scale


def assert_equal(found, wanted, is_real):
    """In all blocks but null blocks; int8 but for how a division by 127 is rounded."""
    for which, store in wanted.items():
        for name, array in store.items():
            ours = np.asarray(found[which][name])[:, is_real]
            theirs, is_int8 = array[:, is_real], "scale" in store
            tolerance = {"rtol": 1e-6, "atol": float(name == "values")} if is_int8 else {"rtol": 0}
            ours, theirs = ours.astype(np.float32), theirs.astype(np.float32)
            np.testing.assert_allclose(ours, theirs, **tolerance, err_msg=f"{which} {name}")
            assert name == "scale" or (ours != theirs).mean() < 1e-3


@KINDS
@KERNELS
@MESHES
def test_rows_keep_what_was_before_their_first_token(kv_dtype, kernel, mesh):
    """A chunk begins within a block; rows of padding change nothing but the null block."""
    rng, mesh = np.random.default_rng(0), make_mesh(mesh)
    devices, rows = batch_rows(mesh), 4
    block = np.array([[3, 5, kv.NULL_BLOCK, 1], [2, 4, 1, kv.NULL_BLOCK]])[:devices]
    first = np.array([[37, 0, 0, 127], [0, 1, 64, 0]])[:devices]
    old = random_stores(rng, mesh, kv_dtype)
    new = {
        which: rng.normal(size=(devices, rows * SIZE, K, width)).astype(np.float32)
        for which, width in WIDTHS.items()
    }
    wanted = jax.tree.map(np.copy, old)
    for d, r in np.ndindex(devices, rows):
        for place in range(first[d, r], SIZE) if block[d, r] else ():
            where = 1, d * NUM_BLOCKS + block[d, r], place
            for which, array in new.items():
                write(wanted, which, *where, array[d, r * SIZE + place], kv_dtype)
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(kv.write_rows, kernel=kernel), donate_argnums=0)
        arrays = {w: put(array, mesh, "batch", None, "heads", None) for w, array in new.items()}
        places = (put(a.reshape(-1).astype(np.int32), mesh, "batch") for a in (block, first))
        found = run(placed(old, mesh), arrays, np.int32(1), *places)
    assert_equal(found, wanted, np.arange(NUM_BLOCKS * devices) % NUM_BLOCKS > 0)


@KINDS
@KERNELS
@MESHES
@pytest.mark.parametrize("lanes", [1, 3])
def test_tokens_go_to_their_places(kv_dtype, kernel, mesh, lanes):
    rng, mesh = np.random.default_rng(1), make_mesh(mesh)
    devices = batch_rows(mesh)
    block = np.array([[4, kv.NULL_BLOCK, 2], [1, 3, 5]])[:devices, :lanes]
    place = np.array([[127, 5, 33], [0, 31, 64]])[:devices, :lanes]
    old = random_stores(rng, mesh, kv_dtype)
    new = {
        which: rng.normal(size=(devices * lanes, 1, K, width)).astype(np.float32)
        for which, width in WIDTHS.items()
    }
    wanted = jax.tree.map(np.copy, old)
    for d, b in np.ndindex(devices, lanes):
        where = 1, d * NUM_BLOCKS + block[d, b], place[d, b]
        for which, array in new.items() if block[d, b] else ():
            write(wanted, which, *where, array[d * lanes + b, 0], kv_dtype)
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(kv.write_token, kernel=kernel), donate_argnums=0)
        arrays = {w: put(array, mesh, "batch", None, "heads", None) for w, array in new.items()}
        places = (put(a.reshape(-1).astype(np.int32), mesh, "batch") for a in (block, place))
        found = run(placed(old, mesh), arrays, np.int32(1), *places)
    assert_equal(found, wanted, np.arange(NUM_BLOCKS * devices) % NUM_BLOCKS > 0)


@KINDS
@KERNELS
def test_blocks_are_read_side_by_side(kv_dtype, kernel):
    rng, mesh = np.random.default_rng(2), make_mesh((1, 1, 1))
    old, blocks = random_stores(rng, mesh, kv_dtype), np.array([5, 1, 1, 4], np.int32)
    for which, width in WIDTHS.items():
        run = jax.jit(kv.gather_blocks, static_argnums=(3, 4, 5))
        found = run(old[which], np.int32(1), blocks, K, "float32", kernel)
        wanted = old[which]["values"][1, blocks].reshape(len(blocks), SIZE, K, width)
        wanted = wanted.astype(np.float32)
        if kv_dtype == "int8":
            wanted *= old[which]["scale"][1, blocks].swapaxes(1, 2)[..., None]
        np.testing.assert_array_equal(found, wanted.reshape(1, -1, K, width))


@pytest.mark.parametrize("is_unstacked", [False, True])
def test_a_pool_is_as_large_as_it_says(is_unstacked):
    c, mesh = models.TINY, make_mesh((2, 1, 2) if not is_unstacked else (1, 1, 1))
    devices, params = batch_rows(mesh), abstract_params(c, mesh)
    if is_unstacked:
        params = jax.tree.map(
            lambda leaf: UnstackedLayers(
                (jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype),) * leaf.shape[0]
            ),
            {name: params[name] for name in kv.STACKS},
        )
    for kv_dtype in kv.KV_DTYPES:
        with jax.set_mesh(mesh):
            pool = jax.eval_shape(lambda kind=kv_dtype: kv.empty(c, params, 5, kind, 16))
        assert kv.block_size(pool) == 16
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pool))
        assert held == devices * 5 * 16 * kv.num_bytes(c, kv_dtype)
