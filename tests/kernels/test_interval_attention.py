"""Attention kernels: every implementation against its definition, in value and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.tolerance import assert_close
from neo_jax.errors import InputError
from neo_jax.kernels import block_list, blockwise, flash
from neo_jax.kernels.interval_attention import interval_attention, make_block_lists
from neo_jax.kernels.intervals import intervals
from neo_jax.kernels.norm_rope import norm_rope
from neo_jax.sharding import make_mesh, put

# rows, queries, keys, query heads, key heads, widths of keys and values, type
SHAPES = [
    (1, 384, 384, 1, 1, 128, 128, "float32"),
    (2, 300, 300, 4, 2, 256, 128, "float32"),  # lengths are not multiples of blocks
    (1, 256, 640, 4, 1, 128, 256, "float32"),  # a part of a row's queries, all of its keys
    (3, 130, 130, 6, 2, 128, 128, "float32"),
    (2, 512, 512, 4, 2, 256, 128, "bfloat16"),
]
CASES = 20  # of each shape


def packing(rng, rows, length):
    """T positions and segments of packed documents of text and images; at times much padding."""
    t, segments = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        place, document = 0, 0
        while place < length and rng.random() > 0.1:
            document += 1
            end = min(length, place + int(rng.integers(1, length)))
            is_new = rng.random(end - place) < rng.choice([0.02, 0.2, 1.0])
            t[row, place:end] = np.cumsum(is_new)
            segments[row, place:end] = document
            place = end
    return t, segments


def bounds_of(rng, rows, queries, keys):
    """Intervals of `queries` that are a part of a row of `keys`; some may see nothing."""
    start, end = map(np.array, intervals(*packing(rng, rows, keys)))
    first = int(rng.integers(0, keys - queries + 1))
    start, end = start[:, first : first + queries], end[:, first : first + queries]
    sees_nothing = rng.random(start.shape) < rng.choice([0, 0.3])
    # An interval that ends before it starts is empty too.
    return start, np.where(sees_nothing, rng.integers(0, start + 1), end)


@functools.partial(jax.jit, static_argnums=6)
def run(q, k, v, start, end, weight, implementation):
    """The output z, and the gradients of sum(weight * z)."""

    def total(q, k, v):
        z = interval_attention(q, k, v, start, end, 0.1, implementation=implementation)
        return jnp.sum(weight * z.astype(jnp.float32)), z

    gradients, z = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return z, *gradients


def arrays_of(rng, b, t, s, n, k, j, h):
    shapes = ((b, t, n, j), (b, s, k, j), (b, s, k, h), (b, t, n, h))
    q, k, v, weight = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return q, k, v, weight / np.float32(np.sqrt(h))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", ["blockwise", "interpreted", "two kernels"])
def test_every_implementation_is_the_definition(shape, implementation, monkeypatch):
    *sizes, dtype = shape
    monkeypatch.setattr(flash, "BLOCKS", (128, 128))
    monkeypatch.setattr(blockwise, "BLOCK", 128)
    if implementation == "two kernels":  # as for rows whose dk and dv do not fit VMEM
        monkeypatch.setattr(flash, "needs_kv_major", lambda *_: True)
    jax.clear_caches()
    rng = np.random.default_rng(0)
    for _ in range(CASES):
        q, k, v, weight = arrays_of(rng, *sizes)
        bounds = bounds_of(rng, *sizes[:3])
        wanted = run(q, k, v, *bounds, weight, "dense")
        q, k, v = (array.astype(dtype) for array in (q, k, v))
        name = "interpreted" if implementation == "two kernels" else implementation
        found = run(q, k, v, *bounds, weight, name)
        assert {str(array.dtype) for array in found} == {dtype}
        # With documents of one token, gradients of queries and keys are 0 but for rounding.
        assert_close(found, wanted, 1e-5 if dtype == "float32" else 2e-2, least=1)
        nothing = np.asarray(bounds[0]) >= np.asarray(bounds[1])
        assert not np.any(np.float32(found[0])[nothing])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("implementation", ["dense", "blockwise", "interpreted"])
def test_the_same_on_a_mesh_with_shared_block_lists(implementation, mesh):
    rng, sizes = np.random.default_rng(1), (4, 640, 640, 4, 2, 128, 128)
    q, k, v, weight = arrays_of(rng, *sizes)
    bounds = bounds_of(rng, *sizes[:3])
    wanted = run(q, k, v, *bounds, weight, "dense")
    mesh = make_mesh(mesh)
    with jax.set_mesh(mesh):
        q, k, v = (put(array, mesh, "batch", None, "heads", None) for array in (q, k, v))
        start, end = (put(np.asarray(array), mesh, "batch", None) for array in bounds)

        weight = put(weight, mesh, "batch", None, "heads", None)

        @jax.jit
        def attend(q, k, v, start, end, weight):
            def total(q, k, v):
                block_lists = make_block_lists(start, end, 640, (128, 128), 4)
                z = interval_attention(q, k, v, start, end, 0.1, block_lists, implementation)
                return jnp.sum(weight * z), z

            gradients, z = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
            return z, *gradients

        assert_close(attend(q, k, v, start, end, weight), wanted, 1e-5)


def test_block_lists_hold_what_is_seen_and_no_more():
    rng = np.random.default_rng(2)
    for _ in range(50):
        start, end = bounds_of(rng, 2, 256, 512)
        key = np.arange(512)
        mask = (key >= start[..., None]) & (key < end[..., None])
        blocks = mask.reshape(2, 4, 64, 8, 64).swapaxes(2, 3)
        low = np.where(start < end, start, 512).reshape(2, 4, 64).min(2)[..., None]
        high = np.where(start < end, end, 0).reshape(2, 4, 64).max(2)[..., None]
        between = (low < np.arange(64, 513, 64)) & (high > np.arange(0, 512, 64))
        assert block_list.count(start, end, 512, 64, 64) == between.sum()
        for kv_major in (False, True):
            make = block_list.kv_major if kv_major else block_list.q_major
            entries, (num_entries,) = map(np.asarray, make(start, end, 512, 64, 64))
            entries = entries[:num_entries]
            query, block = block_list.query_block(entries), block_list.key_block(entries)
            found = np.zeros(between.shape, bool)
            found[query // 4, query % 4, block] = True
            # Rows or columns of blocks that see nothing have one entry.
            assert (found >= between).all()
            assert (found & ~between).sum() == (~between.any(1 if kv_major else 2)).sum()
            order = (query // 4) * 8 + block if kv_major else query
            assert (np.diff(order) >= 0).all()
            changes = np.append(True, np.diff(order) != 0)
            np.testing.assert_array_equal(entries & block_list.FIRST != 0, changes)
            np.testing.assert_array_equal(
                entries & block_list.LAST != 0, np.append(changes[1:], True)
            )
            full = blocks[query // 4, query % 4, block].all((1, 2))
            np.testing.assert_array_equal(entries & block_list.PARTIAL == 0, full)


def test_work_grows_with_the_intervals_and_not_with_the_square():
    """Documents of 1024 tokens, an image and a question each: twice as long, twice the work."""
    counts = []
    for length in (4096, 8192, 16384):
        place = np.arange(length) % 1024
        t = np.where(place < 768, 0, place)[None]
        bounds = map(np.asarray, intervals(t, (np.arange(length) // 1024 + 1)[None]))
        counts.append(block_list.count(*bounds, length, 256, 256))
    assert counts[1] == 2 * counts[0] and counts[2] == 4 * counts[0]
    causal = [(n // 256) * (n // 256 + 1) // 2 for n in (4096, 8192, 16384)]
    assert counts[2] * 8 < causal[2]


@pytest.mark.slow
@pytest.mark.parametrize("groups", [(64, 32, 32), (64, 64)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_and_rotation_in_one_kernel(groups, dtype):
    """Value and gradients, on one device and on a mesh, against the definition in XLA."""
    rng, shape = np.random.default_rng(4), (2, 384, 4, 128)
    t, hw = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    weight = rng.normal(size=(*shape[:3], 256)).astype(np.float32)
    scale, angles = rng.normal(size=256).astype(np.float32), rng.normal(size=(2, 384, 128))
    rotary = np.float32(np.cos(angles)), np.float32(np.sin(angles))

    @functools.partial(jax.jit, static_argnums=6)
    def run(t, hw, scale, cos, sin, weight, kernel):
        def total(t, hw, scale):
            y = norm_rope(t, hw, scale, cos, sin, groups, 1e-6, kernel)
            return jnp.sum(weight * y.astype(jnp.float32)), y

        gradients, y = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(t, hw, scale)
        return y, *gradients

    wanted = run(t, hw, scale, *rotary, weight, None)
    found = run(t.astype(dtype), hw.astype(dtype), scale, *rotary, weight, True)
    assert_close(found, wanted, 1e-5 if dtype == "float32" else 2e-2)
    with jax.set_mesh(mesh := make_mesh((2, 1, 2))):
        t, hw = (put(part, mesh, "batch", None, "heads", None) for part in (t, hw))
        rotary = (put(array, mesh, "batch", None, None) for array in rotary)
        weight = put(weight, mesh, "batch", None, "heads", None)
        assert_close(run(t, hw, scale, *rotary, weight, True), wanted, 1e-5)


def test_unknown_and_unfit_implementations_are_refused():
    q = np.zeros((1, 4, 1, 8), np.float32)
    bounds = np.zeros((2, 1, 4), np.int32)
    with pytest.raises(InputError, match="use one of auto, dense"):
        interval_attention(q, q, q, *bounds, 1.0, implementation="fast")
    with pytest.raises(InputError, match="widths of whole 128s, not"):
        interval_attention(q, q, q, *bounds, 1.0, implementation="pallas")
