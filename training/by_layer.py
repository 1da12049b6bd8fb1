"""The update of the stacked layers one at a time; their moments may wait in host memory.

A loop over the layers takes one layer's moments, updates them and that layer's parameters, and
writes both back in place. What an update makes beside its results, such as float32 sums of moments
that are kept in 8 bits, is there for one layer alone.

Of moments in host memory (`config.optimizer.offload`) the loop fetches one layer's. The update runs
on the device all the same. An array never travels whole: on TPU that held all of it twice.

What stands outside the stack (embedding, loss head, last norm) is updated at once, and its moments
stay on the device: a deep model has few.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax

from parallel.rules import SHARED, STAGED
from training.naming import named

LOOPED = (STAGED, SHARED)  # of which a model has one or the other

Tree = Any
# Name of an array of (parameters, state), as `naming.named` gives it -> the numbers of the layers
# that its first dim is of; None where that is no dim of layers.
Place = Callable[[str], jax.Array | None]
Apply = Callable[[optax.GradientTransformation, Tree, Tree, Tree, Place], tuple[Tree, Tree]]


@dataclass(frozen=True)
class ByLayer:
    """An optimizer in two parts, with the state of the whole: checkpoints do not know of the parts.

    Attributes:
      whole: the optimizer as it is without a loop; it gives the structure of the state.
      layers: the same for stacked parameters, where its trees have None for the others.
      others: the same for the others, where its trees have None for the stacked ones.
      stacked: names of the stacked parameters.
      host: moments of the stacked parameters are in host memory.
    """

    whole: optax.GradientTransformation
    layers: optax.GradientTransformation
    others: optax.GradientTransformation
    stacked: frozenset[str]
    host: bool

    def init(self, params: Tree) -> Tree:
        """The state of step 0; where it goes to the host it is made one layer at a time."""
        if not self.host:
            return self.whole.init(params)
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
          apply: (optimizer, grads, params, state, place) -> (params, state), called with either
            part; with that of the layers in a loop, on [1, ...] of every array.
          grads, params: of all parameters.
          state: of `init`.

        Returns:
          The new parameters and state. Counters count once, whatever the number of layers.
        """
        if self._divided(params):
            assert not self.host
            return apply(self.whole, grads, params, state, self._places(params))
        layer_grads, other_grads = _parts(grads, self.stacked)
        layer_params, other_params = _parts(params, self.stacked)
        arrays = named(state)
        of_layer = jax.eval_shape(self.layers.init, layer_params)
        of_others = jax.eval_shape(self.others.init, other_params)
        moments = {name: arrays[name] for name in self._moments(params)}
        other_params, new = apply(
            self.others, other_grads, other_params, _filled(of_others, arrays), unstacked
        )

        def update_layer(i: jax.Array, carry: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
            def cut(tree: Tree) -> Tree:
                return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i, 1), tree)

            def write(tree: Tree, layer: Tree) -> Tree:
                put = jax.lax.dynamic_update_slice_in_dim
                return jax.tree.map(lambda a, one: put(a, one, i, 0), tree, layer)

            params, moments = carry
            fetched = cut(moments)
            if self.host:
                fetched = jax.device_put(fetched, jax.memory.Space.Device)
            new_params, new = apply(
                self.layers,
                cut(layer_grads),
                cut(params),
                _filled(of_layer, arrays | fetched),
                lambda _: i[None],
            )
            new_moments = {n: named(new)[n] for n in moments}
            if self.host:
                new_moments = jax.device_put(new_moments, jax.memory.Space.Host)
            return write(params, new_params), write(moments, new_moments)

        (depth,) = {len(p) for p in jax.tree.leaves(layer_params)}
        layer_params, moments = jax.lax.fori_loop(0, depth, update_layer, (layer_params, moments))
        new_params = _filled(params, named(layer_params) | named(other_params))
        return new_params, _filled(state, named(new) | moments)

    def placed(self, shardings: Tree, params: Tree) -> Tree:
        """The shardings of a state of `params`, in host memory where its arrays are offloaded."""
        if not self.host:
            return shardings
        arrays = named(shardings)
        hosted = {n: arrays[n].with_memory_kind("pinned_host") for n in self._moments(params)}
        return _filled(shardings, arrays | hosted)

    def _divided(self, params: Tree) -> bool:
        """Whether the layers are divided over the stages of a pipeline, which no loop can cut."""
        layers = jax.tree.leaves(_parts(params, self.stacked)[0])
        return any(tuple(jax.typeof(p).sharding.spec)[:1] not in ((), (None,)) for p in layers)

    def _places(self, params: Tree) -> Place:
        """The layers of the arrays of the whole optimizer."""
        (depth,) = {len(p) for p in jax.tree.leaves(_parts(params, self.stacked)[0])}
        stacked = {f"0/{name}" for name in self.stacked}
        stacked |= {f"1/{name}" for name in self._moments(params)}
        return lambda name: jax.numpy.arange(depth) if name in stacked else None

    def _moments(self, params: Tree) -> list[str]:
        """Names of the arrays that the layers alone have, so no counters."""
        layers, others = _parts(params, self.stacked)
        kept = named(jax.eval_shape(self.others.init, others))
        return [
            name for name in named(jax.eval_shape(self.layers.init, layers)) if name not in kept
        ]


def by_layer(
    make: Callable[[Tree], optax.GradientTransformation], axes: Tree, *, host: bool
) -> ByLayer | optax.GradientTransformation:
    """The optimizer that `make` makes for logical axes, its layers updated one at a time.

    Args:
      host: their moments are in host memory.

    Raises:
      ValueError: of `host`; there are no layers, all being frozen.
    """
    stacked = frozenset(name for name, dims in named(axes).items() if dims.split()[0] in LOOPED)
    if not stacked:
        if not host:
            return make(axes)
        raise ValueError(
            "config.optimizer.offload = True: moments of layers are offloaded, and "
            "config.optimizer.frozen leaves no layer to train; set it to False"
        )
    layers, others = _parts(axes, stacked)
    return ByLayer(make(axes), make(layers), make(others), stacked, host)


def unstacked(name: str) -> None:
    """The place of arrays of which none has a dim of layers."""
    del name


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
