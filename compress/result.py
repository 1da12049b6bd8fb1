"""What a method made of each layer, gathered on the host and laid out as a tree of parameters.

Layers that are done wait in files, where a folder is given: then there is never more than the model
that they are made of and the layer at hand.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from parallel.forms import Form, Forms, written
from parallel.rules import is_stacked
from parallel.stored import Matrix, cast
from training.naming import named, nested
from training.state import Model

Tree = Any


class Result:
    """The weights that change, layer by layer; the others are those of the dense model.

    Args:
      model: dense.
      params: its master parameters.
      folder: an empty one, for layers that are done; None keeps them in memory.
    """

    def __init__(self, model: Model, params: Tree, folder: Path | None = None) -> None:
        self.model, self.params, self._folder = model, params, folder
        self.axes = named(model.axes)
        self.shapes = {name: tuple(a.shape) for name, a in named(params).items()}
        self.dtypes = {name: a.dtype for name, a in named(params).items()}
        self._nodes: dict[str, dict[int, Any]] = {}  # or the files that they are in
        self._forms: dict[str, dict[int, Form]] = {}
        self._arrays: dict[str, np.ndarray] = {}

    def layers(self, name: str) -> int:
        """How many a weight has; 1 outside of stacks."""
        return self.shapes[name][0] if is_stacked(self.axes[name]) else 1

    def matrix(self, name: str) -> Matrix:
        """A weight of one layer as matrices."""
        return Matrix.of(self.shapes[name], self.axes[name])

    def put(self, name: str, layer: int, node: Any, form: Form | None = None) -> None:
        """What a weight of a layer becomes: a node of `form`, or without one an array.

        What is computed with is kept in the dtype of the master copy; codes and scales as they are.
        """
        node = jax.tree.map(np.asarray, cast(node, self.dtypes[name]))
        if self._folder is not None:
            file = self._folder / f"{name.replace('/', '.')}.{layer}"
            file.write_bytes(pickle.dumps(node))
            node = file
        self._nodes.setdefault(name, {})[layer] = node
        self._forms.setdefault(name, {})[layer] = form or Form("none")

    def put_array(self, name: str, array: np.ndarray) -> None:
        """What a weight becomes as a whole, of another shape than it had or new."""
        self._arrays[name] = array.astype(next(iter(self.dtypes.values())))

    def forms(self) -> dict[str, str]:
        """`config.weights.forms` of the result."""
        return {
            name: text_of(self._forms_of(name))
            for name in self._nodes
            if any(form.kind != "none" for form in self._forms_of(name))
        }

    def nodes(self) -> dict[str, list[Any]]:
        """What each changed weight becomes, layer by layer, on the host."""
        return {name: self._nodes_of(name) for name in self._nodes}

    def finished(self, compressed: Model, mesh: jax.sharding.Mesh) -> Tree:
        """The parameters of the model that `forms` gives, at rest.

        Each changed array takes the place of the one that it was made of, which is deleted.
        """
        tree = named(self.params)
        for name in self._nodes:
            own = _branch(compressed.axes, name)
            stacked = is_stacked(self.axes[name])
            tree[name].delete()
            layers = self._nodes_of(name)
            forms = of_layers(self._forms_of(name))
            node = forms.joined(layers, self.matrix(name), np.stack) if stacked else layers[0]
            tree[name] = jax.tree.map(self._placed(compressed, mesh), node, own)
        for name, array in self._arrays.items():
            tree[name] = self._placed(compressed, mesh)(array, _branch(compressed.axes, name))
        return jax.tree.map(lambda _, own: own, compressed.axes, nested(tree))

    def _placed(self, model: Model, mesh: jax.sharding.Mesh) -> Callable[[Any, str], jax.Array]:
        def put(array: np.ndarray, names: str) -> jax.Array:
            spec = model.rules.at_rest(names, array.shape)
            return jax.device_put(array, NamedSharding(mesh, spec))

        return put

    def _nodes_of(self, name: str) -> list[Any]:
        own = [self._nodes[name][i] for i in range(self.layers(name))]
        return [pickle.loads(n.read_bytes()) if isinstance(n, Path) else n for n in own]

    def _forms_of(self, name: str) -> list[Form]:
        return [self._forms[name][i] for i in range(self.layers(name))]


def of_layers(forms: list[Form]) -> Forms:
    """The form of each layer as those of all but some."""
    rest = max(dict.fromkeys(forms), key=forms.count)
    others = [form for form in dict.fromkeys(forms) if form != rest]
    layers = [tuple(i for i, form in enumerate(forms) if form == other) for other in others]
    return Forms(rest, tuple(zip(others, layers, strict=True)))


def text_of(forms: list[Form]) -> str:
    """The same as `config.weights.forms` writes it."""
    found = of_layers(forms)
    named = [f"{written(form)}@{','.join(map(str, layers))}" for form, layers in found.layers]
    return " ".join([*named, written(found.rest)])


def _branch(tree: Mapping[str, Any], name: str) -> Any:
    for part in name.split("/"):
        tree = tree[part]
    return tree
