"""Stacked and unstacked layers: the parameters of a stack, or its part of a cache, and its loop.

    stacked      one array [l, ...] for all layers           one `lax.scan`
    unstacked    one array [...] per layer                   a Python loop
                 (`UnstackedLayers`, in place of an array)

Layers are stacked, so that one layer is compiled for all. For inference on a CPU they are
unstacked: XLA:CPU copies a layer out of a stack before it computes, which takes longer than a
decoded token's products. Only this file knows which of the two a tree is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from neo_jax.model.int8 import Int8Matrix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UnstackedLayers:
    """One array per layer, in place of one array for all layers."""

    layers: tuple[Any, ...]

    def __getitem__(self, index) -> Any:
        return self if index is Ellipsis else self.layers[index]


def place_for_inference(stack: Any, mesh: Mesh) -> Any:
    """Stacked parameters, unstacked if the mesh is one CPU device, where that decodes faster."""
    is_one_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    return unstack_layers(stack) if is_one_cpu else stack


def unstack_layers(stack: Any) -> Any:
    """The tree with `UnstackedLayers` in place of arrays. On one CPU device nothing is copied."""

    def split(array):
        parts = np.asarray(array)
        sharding = NamedSharding(array.sharding.mesh, P(*array.sharding.spec[1:]))
        return [jax.device_put(part, sharding) for part in parts]

    def convert(leaf):
        leaves, structure = jax.tree.flatten(leaf)
        layers = zip(*map(split, leaves), strict=True)
        return UnstackedLayers(tuple(map(structure.unflatten, layers)))

    return jax.tree.map(convert, stack, is_leaf=lambda leaf: isinstance(leaf, Int8Matrix))


def make_like(stack: Any, make: Callable[[int], Any]) -> Any:
    """A tree of arrays that is stacked or not as `stack` is, such as the cache of its layers.

    Args:
      stack: the parameters of a stack.
      make: (number of layers) -> a tree of arrays whose first dimension is that number.
    """
    if not is_unstacked(stack):
        return make(num_layers(stack))
    layers = [make(1) for _ in range(num_layers(stack))]
    return jax.tree.map(lambda *parts: UnstackedLayers(parts), *layers)


def num_layers(stack: Any) -> int:
    """The number of layers of a stack, stacked or not."""
    first = jax.tree.leaves(stack, is_leaf=_is_unstacked_leaf)[0]
    return len(first.layers) if _is_unstacked_leaf(first) else first.shape[0]


def is_unstacked(stack: Any) -> bool:
    """Whether any array of the tree is an `UnstackedLayers`."""
    return any(map(_is_unstacked_leaf, jax.tree.leaves(stack, is_leaf=_is_unstacked_leaf)))


def run_layers(
    stack: Any,
    x: jax.Array,
    body: Callable,
    carry: Any = None,
    wrap: Callable[[Callable], Callable] = lambda step: step,
) -> tuple[jax.Array, Any, Any]:
    """Runs `body` for one layer after another.

    Args:
      stack: parameters of the layers.
      x: what the layers hand on.
      body: (a layer's parameters, layer index, x, carry) -> x, carry, output.
      carry: what else the layers hand on, such as a cache that is written in place; stacked or not
        as `stack` is. If unstacked, `body` gets only the layer's part of it, with layer index 0.
      wrap: a transformation of the scan's body, such as `jax.checkpoint`.

    Returns:
      x, the last carry, and the outputs stacked on a leading layer axis.
    """
    if is_unstacked(stack):
        return _run_unstacked(stack, x, body, carry)

    def step(state, layer_and_index):
        x, carry, output = body(*layer_and_index, *state)
        return (x, carry), output

    indices = jnp.arange(num_layers(stack))
    (x, carry), outputs = jax.lax.scan(wrap(step), (x, carry), (stack, indices))
    return x, carry, outputs


def _run_unstacked(stack: Any, x: jax.Array, body: Callable, carry: Any):
    def select(tree, index):
        return jax.tree.map(lambda leaf: leaf.layers[index], tree, is_leaf=_is_unstacked_leaf)

    carries, outputs = [], []
    for index in range(num_layers(stack)):
        x, layer_carry, output = body(select(stack, index), 0, x, select(carry, index))
        carries.append(layer_carry)
        outputs.append(output)
    carry = jax.tree.map(lambda *layers: UnstackedLayers(layers), *carries)
    return x, carry, jax.tree.map(lambda *layers: jnp.stack(layers), *outputs)


def _is_unstacked_leaf(leaf: Any) -> bool:
    return isinstance(leaf, UnstackedLayers)
