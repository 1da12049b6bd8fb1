"""A stacked weight whose layers are in several forms: more bits or a higher rank where it counts.

Layers of one form are stacked together. A loop over layers has the number of its layer's form and
its place among them, and one branch of a switch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from parallel.stored import (
    Composed,
    Door,
    Matrix,
    Stored,
    is_stored,
    layer_axes,
    layers_of,
)

Tree = Any


@partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["matrix", "form"])
@dataclass(frozen=True)
class ByLayer(Stored):
    """Stacked nodes (or, uncompressed, arrays), one of each form.

    Attributes:
      parts: of each form, what its layers have, in their order.
      form: of each layer, the number of its form.
    """

    parts: tuple[Any, ...]
    matrix: Matrix
    form: tuple[int, ...]

    def cast(self, dtype: Any) -> ByLayer:
        """Each part cast."""
        parts = [p.cast(dtype) if is_stored(p) else p.astype(dtype) for p in self.parts]
        return replace(self, parts=tuple(parts))

    def cut(self) -> list[Any]:
        """Each layer's own node: no switch is left."""
        return self._in_order([layers_of(part) for part in self.parts])

    def cut_axes(self, layers: int) -> list[Any]:
        """See `Stored`."""
        assert layers == len(self.form), (layers, self.form)
        return self._in_order([layer_axes(part, layers) for part in self.parts])

    def _in_order(self, parts: list[list[Any]]) -> list[Any]:
        taken = [iter(layers) for layers in parts]
        return [next(taken[form]) for form in self.form]

    def places(self) -> tuple[list[int], list[int]]:
        """Of each layer its form's number and its place in that part."""
        seen = [0] * len(self.parts)
        place = []
        for form in self.form:
            place.append(seen[form])
            seen[form] += 1
        return list(self.form), place


@partial(
    jax.tree_util.register_dataclass, data_fields=["parts", "form", "place"], meta_fields=["matrix"]
)
@dataclass(frozen=True)
class OneOf(Composed):
    """One layer of a `ByLayer`, by numbers that are known only when it runs."""

    parts: tuple[Any, ...]
    form: jax.Array
    place: jax.Array
    matrix: Matrix

    def cast(self, dtype: Any) -> OneOf:
        """Each part was cast before it came here."""
        raise AssertionError("it lives inside a loop over layers alone")

    def product(self, door: Door, equation: str, x: jax.Array, out: P, inside: P) -> jax.Array:
        """See `Composed`."""

        def branch(part: Any, x: jax.Array, place: jax.Array) -> jax.Array:
            layer = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, place, 0, False), part)
            return door(equation, x, layer, out, inside)

        branches = [partial(branch, part) for part in self.parts]
        return jax.lax.switch(self.form, branches, x, self.place)


def scanned(weights: Tree) -> tuple[Tree, Callable[[Tree], Tree]]:
    """What a loop over layers scans, and what makes of one slice the weights of a layer."""
    nodes = jax.tree.leaves(weights, is_leaf=_by_layer)
    structure: Any = jax.tree.structure(weights, is_leaf=_by_layer)
    held = {i: node for i, node in enumerate(nodes) if _by_layer(node)}
    if not held:
        return weights, lambda layer: layer

    def numbers(node: ByLayer) -> tuple[jax.Array, jax.Array]:
        form, place = node.places()
        return jnp.array(form), jnp.array(place)

    xs = [numbers(node) if i in held else node for i, node in enumerate(nodes)]

    def of_layer(layer: Any) -> Tree:
        leaves = [
            OneOf(held[i].parts, leaf[0], leaf[1], held[i].matrix) if i in held else leaf
            for i, leaf in enumerate(layer)
        ]
        return structure.unflatten(leaves)

    return xs, of_layer


def _by_layer(node: Any) -> bool:
    return isinstance(node, ByLayer)
