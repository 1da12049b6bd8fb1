"""A model one layer after the other, each with what calibration text puts into its matrices.

Layers are made smaller in their order, and the next one's inputs are those that the smaller ones
give, as in GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323). Beside the model there are
the residual stream of the calibration text and one layer: its weights and its sums. (One period of
layers, where kinds of layers alternate.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress.calibration import Calibration
from compress.watch import Inputs, Recorder, Watched
from models.stack import STACKED
from parallel.rules import is_stacked
from parallel.stored import is_stored
from parallel.zero import for_model
from training.micro_batches import Batch, counted
from training.naming import named, nested
from training.state import Model
from training.stored import is_matrix

Tree = Any
STACK = f"stack/{STACKED}/"


@dataclass(frozen=True)
class Layer:
    """What a visitor is given of one layer.

    Attributes:
      number: from 0.
      weights: canonical name -> this layer's array, float32, NumPy.
      inputs: the same names, of matrices -> `Inputs`, NumPy.
    """

    number: int
    weights: dict[str, np.ndarray]
    inputs: dict[str, Inputs]


Visit = Callable[[Layer], Mapping[str, Any]]


def stack_names(model: Model) -> list[str]:
    """The canonical names of the arrays of the stack that a walk goes through."""
    axes = {n: a for n, a in named(model.axes).items() if n.startswith(STACK)}
    assert all(is_stacked(names) for names in axes.values()), axes
    return list(axes)


def matrices_of(model: Model) -> dict[str, str]:
    """Those of them that are matrices, with their logical axes."""
    axes = named(model.axes)
    return {n: axes[n] for n in stack_names(model) if is_matrix(n, axes[n])}


def check_walk(model: Model, what: str, names: Iterable[str] = ()) -> None:
    """Refuses a model whose layers cannot be walked.

    Args:
      what: is calibrated, for messages.
      names: of the matrices that are wanted.

    Raises:
      ValueError: naming the reason.
    """
    axes = named(model.axes)
    if any("experts" in axes[n].split() for n in stack_names(model)):
        raise ValueError(
            f"{what}: calibrated on what goes into a matrix, which is not summed for experts "
            f"(config.experts.number); choose a method without calibration"
        )
    if any(axes[n].startswith("shared_layers") for n in stack_names(model)):
        raise ValueError(
            f"{what}: calibrated layer by layer, and layers share blocks here "
            f"(config.model.distinct); choose a method without calibration"
        )
    beyond = sorted(set(names) - set(matrices_of(model)))
    if beyond or not matrices_of(model):
        what_else = ", ".join(beyond[:3]) or "none of this family"
        raise ValueError(
            f"{what}: calibrated on the layers of a decoder or encoder alone ({STACK}*), and not "
            f"{what_else}; leave that out by --only='{STACK}*', or choose a method without "
            f"calibration"
        )


def walk(text: Calibration, params: Tree, visit: Visit | None) -> None:
    """Runs calibration text through the layers, and `visit` at each.

    Args:
      params: the model's master parameters at rest, on any mesh.
      visit: a layer -> its weights as they are to be run with, by name; those that are left out
        stay. None runs the layers as they are.
    """
    model = text.model
    assert model.cut is not None
    cut, period = model.cut, model.cut.period
    flat, matrices = named(params), matrices_of(model)
    stacked = {name: flat.pop(name) for name in stack_names(model)}
    layout = list[list[list[str]]]()

    def built(outside: dict[str, Any], layers: dict[str, Any]) -> dict[str, Any]:
        axes = named(model.axes)
        arrays = outside | layers
        leaves, build = for_model(arrays, {n: axes[n] for n in arrays}, model.rules, "float32")
        return build(leaves)

    @jax.jit
    def embed(outside: dict[str, Any], batch: Batch) -> jax.Array:
        return cut.embed(nested(built(outside, {}) | dict.fromkeys(stacked)), batch, None)

    @jax.jit
    def run(
        outside: dict[str, Any], layers: dict[str, Any], x: jax.Array, batch: Batch, first: Any
    ) -> jax.Array:
        tree = nested(built(outside, layers))
        return cut.blocks(tree, x, batch, None, first, counted(batch))

    @jax.jit
    def sums(
        outside: dict[str, Any], layers: dict[str, Any], x: jax.Array, batch: Batch, first: Any
    ) -> list[Inputs]:
        recorder = Recorder(counted(batch).tokens_BT)
        watched = {
            name: Watched(leaf, recorder, name) if name in matrices else leaf
            for name, leaf in built(outside, layers).items()
        }
        cut.blocks(nested(watched), x, batch, None, first, counted(batch))
        layout.append(recorder.names)
        return recorder.found

    @jax.jit
    def take(stacked: dict[str, Any], first: Any) -> dict[str, jax.Array]:
        cut_out = lambda a: jax.lax.dynamic_slice_in_dim(a, first, period)
        return {name: cut_out(array) for name, array in stacked.items()}

    @partial(jax.jit, donate_argnums=0)
    def add(some: list[Inputs], more: list[Inputs]) -> list[Inputs]:
        return [a.plus(b) for a, b in zip(some, more, strict=True)]

    outside = text.here(flat)
    with jax.set_mesh(text.mesh):
        xs = [embed(outside, batch) for batch in text.batches]
    for first in range(0, cut.layers, period):
        number = jnp.int32(first)
        layers = text.here(take(stacked, number))
        number = text.here(number)
        if visit is not None:
            total = None
            with jax.set_mesh(text.mesh):
                for i, (x, batch) in enumerate(zip(xs, text.batches, strict=True)):
                    found = sums(outside, layers, x, batch, number)
                    total = found if i == 0 else add(total, found)
            host = [Inputs(*map(jax.device_get, sums)) for sums in total or []]
            del found, total
            layers = _visited(text, visit, layers, host, layout[0], first, period)
        with jax.set_mesh(text.mesh):
            xs = [run(outside, layers, x, b, number) for x, b in zip(xs, text.batches, strict=True)]


def _visited(
    text: Calibration,
    visit: Visit,
    layers: dict[str, jax.Array],
    found: list[Inputs],
    owners: list[list[str]],
    first: int,
    period: int,
) -> dict[str, jax.Array]:
    """The layers of one period as the visitor left them."""
    inputs: list[dict[str, Inputs]] = [{} for _ in range(period)]
    for sums, names in zip(found, owners, strict=True):
        for name in names:
            place = next(i for i in range(period) if name not in inputs[i])
            inputs[place][name] = sums
    for place in range(period):
        whole = {n: np.asarray(np.asarray(a)[place], np.float32) for n, a in layers.items()}
        changed = visit(Layer(first + place, whole, inputs[place]))
        with jax.set_mesh(text.mesh):
            for name, array in changed.items():
                layers[name] = _put(layers[name], text.here(np.asarray(array)), place)
    return layers


@jax.jit
def _put(layers: jax.Array, one: jax.Array, place: Any) -> jax.Array:
    own = one.reshape(layers.shape[1:]).astype(layers.dtype)
    return jax.lax.dynamic_update_index_in_dim(layers, own, place, 0)


def is_dense(params: Tree) -> bool:
    """Whether no weight is stored in another form."""
    return not any(is_stored(n) for n in jax.tree.leaves(params, is_leaf=is_stored))
