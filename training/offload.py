"""Moments of the stacked layers in host memory, on the device one layer at a time.

The update runs on the device, as without offload: only where the moments wait is another place. A
loop over the layers fetches one layer's moments, updates them and that layer's parameters, and
writes both back in place. An array never travels whole: on TPU that held all of it twice.

Moments of what stands outside the stack (embedding, loss head, last norm) stay on the device: a
deep model has few.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax

from parallel.rules import SHARED, STAGED
from training.naming import named

OFFLOADED = (STAGED, SHARED)  # of which a model has one or the other

Tree = Any
Apply = Callable[[optax.GradientTransformation, Tree, Tree, Tree], tuple[Tree, Tree]]


@dataclass(frozen=True)
class Offloaded:
    """An optimizer in two parts, with the state of the whole: checkpoints do not know of offload.

    Attributes:
      whole: the optimizer as it is without offload; it gives the structure of the state.
      layers: the same for stacked parameters, where its trees have None for the others.
      others: the same for the others, where its trees have None for the stacked ones.
      stacked: names of the stacked parameters.
    """

    whole: optax.GradientTransformation
    layers: optax.GradientTransformation
    others: optax.GradientTransformation
    stacked: frozenset[str]

    def init(self, params: Tree) -> Tree:
        """The state of step 0; that of the layers is made one layer at a time."""
        layers, others = _parts(params, self.stacked)
        moments = self._moments(params)

        def init_layer(_: None, layer: Tree) -> tuple[None, dict[str, jax.Array]]:
            state = named(self.layers.init(jax.tree.map(lambda p: p[None], layer)))
            return None, jax.device_put(
                {name: state[name][0] for name in moments}, jax.memory.Space.Host
            )

        _, offloaded = jax.lax.scan(init_layer, None, layers)
        structure = jax.eval_shape(self.whole.init, params)
        return _filled(structure, named(self.others.init(others)) | offloaded)

    def update(self, apply: Apply, grads: Tree, params: Tree, state: Tree) -> tuple[Tree, Tree]:
        """One update of everything.

        Args:
          apply: (optimizer, grads, params, state) -> (params, state), called with either part; with
            that of the layers in a loop, on [1, ...] of every array.
          grads, params: of all parameters.
          state: of `init`.

        Returns:
          The new parameters and state. Counters count once, whatever the number of layers.
        """
        layer_grads, other_grads = _parts(grads, self.stacked)
        layer_params, other_params = _parts(params, self.stacked)
        arrays = named(state)
        of_layer = jax.eval_shape(self.layers.init, layer_params)
        of_others = jax.eval_shape(self.others.init, other_params)
        moments = {name: arrays[name] for name in self._moments(params)}
        other_params, new = apply(
            self.others, other_grads, other_params, _filled(of_others, arrays)
        )

        def update_layer(i: jax.Array, carry: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
            def cut(tree: Tree) -> Tree:
                return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i, 1), tree)

            def write(tree: Tree, layer: Tree) -> Tree:
                put = jax.lax.dynamic_update_slice_in_dim
                return jax.tree.map(lambda a, one: put(a, one, i, 0), tree, layer)

            params, moments = carry
            fetched = jax.device_put(cut(moments), jax.memory.Space.Device)
            new_params, new = apply(
                self.layers, cut(layer_grads), cut(params), _filled(of_layer, arrays | fetched)
            )
            new_moments = jax.device_put({n: named(new)[n] for n in moments}, jax.memory.Space.Host)
            return write(params, new_params), write(moments, new_moments)

        (depth,) = {len(p) for p in jax.tree.leaves(layer_params)}
        layer_params, moments = jax.lax.fori_loop(0, depth, update_layer, (layer_params, moments))
        new_params = _filled(params, named(layer_params) | named(other_params))
        return new_params, _filled(state, named(new) | moments)

    def placed(self, shardings: Tree, params: Tree) -> Tree:
        """The shardings of a state of `params`, in host memory where its arrays are offloaded."""
        arrays = named(shardings)
        hosted = {n: arrays[n].with_memory_kind("pinned_host") for n in self._moments(params)}
        return _filled(shardings, arrays | hosted)

    def _moments(self, params: Tree) -> list[str]:
        """Names of the arrays that are offloaded: what the layers alone have, so no counters."""
        layers, others = _parts(params, self.stacked)
        kept = named(jax.eval_shape(self.others.init, others))
        return [
            name for name in named(jax.eval_shape(self.layers.init, layers)) if name not in kept
        ]


def offloaded(make: Callable[[Tree], optax.GradientTransformation], axes: Tree) -> Offloaded:
    """The optimizer that `make` makes for logical axes, the moments of its layers offloaded.

    Raises:
      ValueError: there are none, all being frozen.
    """
    stacked = frozenset(name for name, dims in named(axes).items() if dims.split()[0] in OFFLOADED)
    if not stacked:
        raise ValueError(
            "config.optimizer.offload = True: moments of layers are offloaded, and "
            "config.optimizer.frozen leaves no layer to train; set it to False"
        )
    layers, others = _parts(axes, stacked)
    return Offloaded(make(axes), make(layers), make(others), stacked)


def _parts(tree: Tree, stacked: frozenset[str]) -> tuple[Tree, Tree]:
    """A tree like the parameters, with None for all but the stacked ones, and for just those."""
    arrays = named(tree)
    inside = {name: array if name in stacked else None for name, array in arrays.items()}
    outside = {name: None if name in stacked else array for name, array in arrays.items()}
    return _filled(tree, inside), _filled(tree, outside)


def _filled(structure: Tree, arrays: Mapping[str, Any]) -> Tree:
    """A tree of this structure, of the arrays with its names."""
    leaves = [arrays[name] for name in named(structure)]
    return jax.tree.unflatten(jax.tree.structure(structure), leaves)
