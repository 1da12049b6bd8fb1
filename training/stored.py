"""A model whose weights are stored in other forms, by `config.weights`.

The forms are part of what a checkpoint is of, as the model's sizes are: a run has them in its
config, so that whoever opens it knows the tree before anything is read. What is packed is frozen;
factors are trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parallel.by_layer import ByLayer
from parallel.forms import Forms, read_forms
from parallel.rules import STACKS
from parallel.stored import Matrix, Packed, dense_layer, is_stored, whole_dims
from training.naming import named
from training.state import Model, drawn_shapes

Tree = Any


@dataclass(frozen=True)
class WeightsConfig:
    """In what form weights are at rest (`config.weights`).

    Attributes:
      forms: pattern of canonical names -> form (`parallel.forms`), such as
        {"stack/*/mlp/*": "int4:128"}; the longest pattern that a name matches counts.
    """

    forms: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pattern, text in self.forms.items():
            read_forms(text, self.key(pattern))

    def key(self, pattern: str) -> str:
        """The config key of a pattern."""
        return f"config.weights.forms[{pattern!r}]"


def stored(model: Model, config: WeightsConfig) -> Model:
    """The model with the weights stored in the forms that the config gives them.

    Raises:
      ValueError: a pattern that names no matrix, or a matrix that cannot have the form.
    """
    if not config.forms:
        return model
    shapes = drawn_shapes(model)
    forms = chosen_forms(config, {n: a.shape for n, a in named(shapes).items()}, named(model.axes))
    names = list(named(model.axes))

    def each(function: Any, *trees: Tree) -> Tree:
        leaves = [jax.tree.leaves(tree) for tree in trees]
        found = [
            function(forms[name], *values) if name in forms else values[0]
            for name, *values in zip(names, *leaves, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(trees[0]), found)

    axes = each(lambda f, names, a: f.axes(a.shape, names, model.rules), model.axes, shapes)

    def init(key: jax.Array) -> Tree:
        """Drawn, then rounded or cut off: what a checkpoint does not give."""

        def packed(forms: Forms, array: jax.Array, names: str) -> Any:
            return store_array(forms, array, names)

        params = each(packed, model.init(key), model.axes)
        rules = model.rules
        return jax.tree.map(lambda a, n: jax.reshard(a, rules.at_rest(n, a.shape)), params, axes)

    return replace(model, init=init, axes=axes, frozen=model.frozen | packed_names(axes))


def store_array(forms: Forms, array: jax.Array, names: str) -> Any:
    """A whole array in its forms; it is not divided then."""
    matrix = Matrix.of(array.shape, names)
    w = whole_dims(matrix, array)
    if names.split()[0] not in STACKS:
        return forms.rest.store(matrix, w)
    distinct, which = forms.parts(len(w))
    # One layer after the other, traced once for each form.
    parts = [
        jax.lax.map(partial(form.store, matrix), w[np.flatnonzero(np.array(which) == i)])
        for i, form in enumerate(distinct)
    ]
    return parts[0] if len(parts) == 1 else ByLayer(tuple(parts), matrix, which)


def packed_names(axes: Tree) -> frozenset[str]:
    """The canonical names of the arrays of packed weights."""
    found: set[str] = set()
    for path, node in jax.tree_util.tree_leaves_with_path(axes, is_leaf=_packed):
        if _packed(node):
            top = jax.tree_util.keystr(path, simple=True, separator="/")
            found.update(f"{top}/{name}" for name in named(node))
    return frozenset(found)


def chosen_forms(
    config: WeightsConfig,
    shapes: Mapping[str, tuple[int, ...]],
    axes: Mapping[str, str],
    *,
    key: str = "",
) -> dict[str, Forms]:
    """The form of every weight that is not an array, by canonical name.

    Args:
      key: what gave the forms, for messages, where it is not the config.

    Raises:
      ValueError: as `stored`.
    """
    found: dict[str, Forms] = {}
    for name, shape in shapes.items():
        patterns = [pattern for pattern in config.forms if fnmatchcase(name, pattern)]
        if not patterns:
            continue
        pattern = max(patterns, key=len)
        where = key or f"{config.key(pattern)} = {config.forms[pattern]!r}"
        forms = read_forms(config.forms[pattern], where)
        if not is_matrix(name, axes[name]):
            continue
        matrix = Matrix.of(shape, axes[name])
        stacked = axes[name].split()[0] in STACKS
        last = max((layer for _, layers in forms.layers for layer in layers), default=-1)
        if forms.layers and (not stacked or last >= shape[0]):
            there = f"layers 0 to {shape[0] - 1}" if stacked else "no layers"
            raise ValueError(f"{where}: {name} has {there}")
        number = shape[0] if stacked else 1
        for form in dict.fromkeys(forms.of_layers(number)):
            form.check(matrix, f"{where}: {name}")
        if any(form.kind != "none" for form in forms.of_layers(number)):
            found[name] = forms
    for pattern in config.forms:
        if not any(fnmatchcase(name, pattern) and is_matrix(name, axes[name]) for name in shapes):
            raise ValueError(
                f"{key or config.key(pattern)}: {pattern!r} names no matrix of the layers; a "
                f"pattern is such as 'stack/*/mlp/*' or 'stack/*'"
            )
    return found


def is_matrix(name: str, axes: str) -> bool:
    """Whether a weight is a matrix that products of `parallel.einsum` are with.

    Tables are looked up, and a router's small table is read in float32: they stay arrays.
    """
    dims = axes.replace("->", " -> ").split()
    tables = {"vocab", "position", "token_type", "bucket", "router"}
    return "->" in dims and not tables & set(dims) and not name.endswith("patch")


def dense_params(params: Tree, axes: Tree) -> Tree:
    """Every packed or factored weight as the array that it stands for, one layer at a time.

    Args:
      params: at rest; call it under the mesh.
    """

    def dense(node: Any, axes: Any) -> Any:
        if not is_stored(node):
            return node
        layers = node.cut() if _stacked(axes) else [node]
        made = [dense_layer(layer) for layer in layers]
        return jnp.stack(made) if _stacked(axes) else made[0]

    return jax.tree.map(dense, params, axes, is_leaf=is_stored)


def _stacked(axes: Any) -> bool:
    return jax.tree.leaves(axes)[0].split()[0] in STACKS


def _packed(node: Any) -> bool:
    return isinstance(node, Packed)
