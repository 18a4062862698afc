"""Reads parameters from disk onto the devices, as floats or quantised to int8.

Each device's shard is read once. No host and no device holds the whole model. With int8, only a
layer or a block of rows exists as floats at a time.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from neo_jax.model.int8 import Int8Matrix, as_int8
from neo_jax.model.neo import abstract_params
from neo_jax.model_config import ModelConfig
from neo_jax.weights.row import Index, ParamPath

# Reads a part of a parameter, given its path, its shape and dtype, and an index.
ReadPart = Callable[[ParamPath, jax.ShapeDtypeStruct, Index], np.ndarray]

_BLOCK_BYTES = 64 * 2**20


def param_target(c: ModelConfig, mesh: Mesh, dtype: str, weights: str | None = None) -> dict:
    """Shape, dtype and sharding of every parameter; matrices are int8 if `weights` is "int8"."""
    target = abstract_params(c, mesh, dtype)
    return as_int8(target) if weights == "int8" else target


def place_params(target: dict, read: ReadPart) -> dict:
    """Reads every parameter into the shape, dtype and sharding of `target`.

    An `Int8Matrix` of `target` is read as float32 and quantised. Its values are the same on every
    mesh, since a scale is always made from the whole channel.
    """

    def place(path, leaf):
        path = tuple(entry.key for entry in path)
        if isinstance(leaf, Int8Matrix):
            wide = jax.ShapeDtypeStruct(leaf.shape, np.float32)
            return _place_int8(leaf, lambda index: read(path, wide, index))
        part = _cached(lambda index: read(path, leaf, index), leaf.shape)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

    return jax.tree_util.tree_map_with_path(
        place, target, is_leaf=lambda leaf: isinstance(leaf, Int8Matrix)
    )


def quantise(matrix: np.ndarray, contracted: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A float32 matrix as int8 values in -127..127 and scales of size 1 along `contracted` axes."""
    largest = np.maximum(
        matrix.max(contracted, keepdims=True), -matrix.min(contracted, keepdims=True)
    )
    scale = largest / np.float32(127)
    values = matrix / np.where(scale == 0, np.float32(1), scale)
    return np.rint(values, out=values).astype(np.int8), scale


def _place_int8(leaf: Int8Matrix, read: Callable[[Index], np.ndarray]) -> Int8Matrix:
    # A dimension of size 1 counts as contracted too, which changes nothing.
    contracted = tuple(axis for axis, size in enumerate(leaf.scale.shape) if size == 1)

    def quantised(index: Index) -> tuple[np.ndarray, np.ndarray]:
        bounds = [i.indices(size)[:2] for i, size in zip(index, leaf.shape, strict=True)]
        shape = [stop - start for start, stop in bounds]
        values = np.empty(shape, np.int8)
        scale = np.empty([1 if i in contracted else n for i, n in enumerate(shape)], np.float32)
        step = max(1, _BLOCK_BYTES // (4 * math.prod(shape[1:])))
        for done in range(0, shape[0], step):
            block = slice(done, min(done + step, shape[0]))
            rows = slice(bounds[0][0] + block.start, bounds[0][0] + block.stop)
            values[block], scale[block] = quantise(read((rows, *index[1:])), contracted)
        return values, scale

    whole_channels = _cached(quantised, leaf.shape)

    def widen(index: Index) -> Index:
        return tuple(slice(None) if axis in contracted else i for axis, i in enumerate(index))

    def values(index: Index) -> np.ndarray:
        part = tuple(i if axis in contracted else slice(None) for axis, i in enumerate(index))
        return whole_channels(widen(index))[0][part]

    def scale(index: Index) -> np.ndarray:
        return whole_channels(widen(index))[1]

    return Int8Matrix(
        jax.make_array_from_callback(leaf.shape, leaf.values.sharding, values),
        jax.make_array_from_callback(leaf.scale.shape, leaf.scale.sharding, scale),
    )


def _cached(read: Callable[[Index], Any], shape: tuple[int, ...]) -> Callable[[Index], Any]:
    """`read` with a cache, so that a part which several devices hold is read once."""
    parts = {}

    def part(index: Index):
        box = tuple(range(*i.indices(size)) for i, size in zip(index, shape, strict=True))
        if box not in parts:
            parts[box] = read(index)
        return parts[box]

    return part
