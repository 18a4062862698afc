"""Attention of decoding over blocks of the pool, against its definition over what is cached."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo_jax.kernels import decode_attention as module
from neo_jax.kernels import pallas_decode
from neo_jax.kernels.decode_attention import decode_attention
from neo_jax.model import kv_cache
from neo_jax.sharding import batch_rows, make_mesh, put

L, NUM_BLOCKS, SIZE, K, N, J, H = 2, 24, 128, 2, 4, 256, 128


def stores_of(rng, mesh, dtype, size=SIZE):
    """Stores of random keys and values, and what they hold: [blocks, size, K, width] float64."""
    stores, exact, blocks = {}, {}, NUM_BLOCKS * batch_rows(mesh)
    for which, width in (("k", J), ("v", H)):
        heads = rng.normal(size=(L, blocks, size, K, width))
        if dtype == "int8":
            scale = np.float32(np.abs(heads).max(-1) / 127)
            heads = np.round(heads / scale[..., None])
            store = {"values": heads.astype(np.int8), "scale": scale.swapaxes(2, 3)}
            heads = heads * scale[..., None]
        else:
            store = {"values": jnp.asarray(heads, dtype)}
            heads = np.float64(store["values"])
        store["values"] = store["values"].reshape(L, blocks, size, K * width)
        places = kv_cache.partition(store)
        stores[which] = {
            name: jax.device_put(part, jax.NamedSharding(mesh, places[name]))
            for name, part in store.items()
        }
        exact[which] = heads
    return stores, exact


def definition(q, exact, layer, tables, ends, scale, devices):
    out, lanes = np.zeros((*q.shape[:3], H)), len(q) // devices
    for lane, (table, end) in enumerate(zip(tables, ends, strict=True)):
        blocks = table + NUM_BLOCKS * (lane // lanes)
        k, v = (
            exact[name][layer, blocks].reshape(-1, K, exact[name].shape[-1])[:end] for name in "kv"
        )
        for head in range(N if end else 0):
            scores = scale * k[:, head // (N // K)] @ np.float64(q[lane, 0, head])
            p = np.exp(scores - scores.max())
            out[lane, 0, head] = p @ v[:, head // (N // K)] / p.sum()
    return out


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("kernel", [None, True], ids=["xla", "kernel"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_decoding_is_the_definition_over_the_lanes_blocks(dtype, kernel, mesh, monkeypatch):
    monkeypatch.setattr(pallas_decode, "TOKENS", 256)
    monkeypatch.setattr(module, "TOKENS", 256)
    rng, mesh = np.random.default_rng(3), make_mesh(mesh)
    devices, scale = batch_rows(mesh), 0.1
    ends = np.array([1, 700, 0, 256, 129, 128, 385, 0], np.int32)
    with jax.set_mesh(mesh):
        stores, exact = stores_of(rng, mesh, dtype)
        of = "float32" if dtype == "int8" else dtype
        q = np.asarray(jnp.asarray(rng.normal(size=(len(ends), 1, N, J)), of))
        run = jax.jit(
            lambda q, k, v, layer, table, end: decode_attention(
                q, k, v, layer, table, end, K, scale, kernel
            )
        )
        for _ in range(2):
            tables = np.stack([rng.permutation(NUM_BLOCKS)[:6] for _ in ends]).astype(np.int32)
            tables[3, :2] = tables[1, :2]  # a prefix in common
            arrays = put(q, mesh, "batch", None, "heads", None), stores["k"], stores["v"]
            bounds = put(tables, mesh, "batch", None), put(ends, mesh, "batch")
            found = run(*arrays, np.int32(1), *bounds)
            wanted = definition(q, exact, 1, tables, ends, scale, devices)
            tolerance = 2e-2 if dtype == "bfloat16" else 2e-5
            np.testing.assert_allclose(np.float32(found), wanted, atol=tolerance)
            assert not np.any(np.float32(found)[ends == 0])
            rng.shuffle(ends)


@pytest.mark.parametrize("kernel", [None, True], ids=["xla", "kernel"])
def test_a_lane_does_not_depend_on_the_others(kernel):
    """To the bit; and what is in blocks that are not its own does not matter."""
    rng, mesh = np.random.default_rng(4), make_mesh((1, 1, 1))
    with jax.set_mesh(mesh):
        stores, _ = stores_of(rng, mesh, "float32")
        q = rng.normal(size=(3, 1, N, J)).astype(np.float32)
        tables = np.arange(1, 19, dtype=np.int32).reshape(3, 6)
        run = jax.jit(
            lambda q, k, v, table, end: decode_attention(q, k, v, 0, table, end, K, 0.1, kernel)
        )
        found = [
            np.asarray(run(q, stores["k"], stores["v"], tables, np.int32(ends)))[0]
            for ends in ([300, 0, 0], [300, 700, 20])
        ]
        is_mine = np.isin(np.arange(NUM_BLOCKS), tables[0, :3])[:, None, None]
        scrambled = jax.tree.map(
            lambda a: jax.device_put(np.where(is_mine, a, 0), a.sharding), stores
        )
        q[1:] = 0
        ends = np.int32([300, 1, 768])
        found.append(np.asarray(run(q, scrambled["k"], scrambled["v"], tables, ends))[0])
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize("size", [16, 48])
def test_blocks_that_no_kernel_takes(size):
    rng, mesh = np.random.default_rng(5), make_mesh((1, 1, 1))
    with jax.set_mesh(mesh):
        stores, exact = stores_of(rng, mesh, "float32", size)
        q = rng.normal(size=(2, 1, N, J)).astype(np.float32)
        tables = rng.integers(0, NUM_BLOCKS, (2, 23)).astype(np.int32)
        ends = np.int32([23 * size, size + 1])
        found = decode_attention(q, stores["k"], stores["v"], 1, tables, ends, K, 0.1)
    wanted = definition(q, exact, 1, tables, ends, 0.1, 1)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
