"""L blocks as one: parameters with a leading layer axis, built by `vmap` and run by `lax.scan`.

Compile time does not grow with depth, and XLA:CPU honours rematerialisation only inside a loop.

Layers may share blocks: all of them one (ALBERT, Lan et al. 2019, https://arxiv.org/abs/1909.11942),
several in turn ("cycle", as the Universal Transformer repeats its one,
https://arxiv.org/abs/1807.03819), or neighbours the same ("repeat", MobileLLM, Liu et al. 2024,
https://arxiv.org/abs/2402.14905). Then D < L blocks are stored, and an iteration takes its own by
number: nothing is L times as large but what the backward pass keeps of activations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from parallel.by_layer import scanned
from parallel.remat import RematConfig, remat
from parallel.rules import SHARED, STAGED

# The attribute of a Stack, and the name in a checkpoint, below which arrays are [L, ...], or
# [distinct, ...] where layers share blocks.
STACKED = "blocks"


class Stack(nnx.Module):
    """L blocks of one form.

    Args:
      make_block: rngs -> a block; called once, under vmap.
      layers: L.
      pattern: the static kind of every layer, repeated over the depth; a loop iteration runs one
        period, so that a kind (a window, say) is known when its code is compiled.
      axis: logical name of the layer axis; STAGED becomes SHARED where layers share blocks.
      distinct: blocks that the layers share; 0: every layer has its own.
      sharing: which layer has which: "cycle" (0 1 2 0 1 2) or "repeat" (0 0 1 1 2 2).
    """

    def __init__(
        self,
        make_block: Callable[[nnx.Rngs], nnx.Module],
        layers: int,
        rngs: nnx.Rngs,
        *,
        pattern: tuple[Any, ...] = (None,),
        remat: RematConfig,
        unroll: int = 1,
        axis: str = STAGED,
        distinct: int = 0,
        sharing: str = "cycle",
    ) -> None:
        graphs: list[Any] = []

        def make(key: jax.Array) -> nnx.State:
            graph, state = nnx.split(make_block(nnx.Rngs(params=key)))
            graphs.append(graph)
            return state

        state = jax.vmap(make)(jax.random.split(rngs.params(), distinct or layers))
        self.blocks = nnx.merge(graphs[0], state)
        self.layers, self.pattern, self.remat, self.unroll = layers, pattern, remat, unroll
        self.axis = SHARED if distinct and axis == STAGED else axis
        self.distinct, self.sharing = distinct, sharing

    def block_of(self, layer: jax.Array) -> jax.Array:
        """The number of the block that a layer shares."""
        if self.sharing == "repeat":
            return layer // (self.layers // self.distinct)
        return layer % self.distinct

    def run(
        self,
        apply: Callable[[Any, Any, jax.Array | None, Any], Any],
        carry: Any,
        key: jax.Array | None = None,
        first: int | jax.Array | None = None,
    ) -> Any:
        """Runs the layers in order: all of them, or a unit of a pipeline's stage.

        Args:
          apply: (block, carry, key of the layer, kind of the layer) -> carry.
          carry: any tree of arrays, the residual stream at least.
          key: folded with the layer's number, so that it knows nothing of loops; None stays None.
          first: the number of a unit's first layer in the model, a multiple of the pattern's
            period; None for all layers. A unit has the layers that the weights are of; where blocks
            are shared, one period.

        Returns:
          The carry after the last layer.
        """
        graph, state = nnx.split(self.blocks)
        weights, of_layer = scanned(nnx.to_pure_dict(state))
        pattern, period = self.pattern, len(self.pattern)
        if self.distinct:
            shared, weights = weights, {}
            number = self.layers if first is None else period
        else:
            number = len(jax.tree.leaves(weights)[0])
        periods = number // period
        looped = periods > self.unroll  # else the scan is no loop in the compiled program

        def run_layer(
            carry: Any, xs: tuple[Any, Any], kind: Any, place: int | None, looped: bool
        ) -> Any:
            def layer(carry: Any, xs: tuple[Any, Any]) -> Any:
                # Weights are cut out here and not before, or the cut is kept for the backward pass.
                if place is not None:
                    xs = jax.tree.map(lambda a: jax.lax.index_in_dim(a, place, 0, False), xs)
                weights, index = xs
                if self.distinct:
                    block = self.block_of(index)
                    weights = jax.tree.map(
                        lambda a: jax.lax.dynamic_index_in_dim(a, block, 0, False), shared
                    )
                layer_key = None if key is None else jax.random.fold_in(key, index)
                return apply(nnx.merge(graph, of_layer(weights)), carry, layer_key, kind)

            slices = place is not None or self.distinct > 0
            return remat(layer, self.remat, looped=looped, slices=slices)(carry, xs)

        def body(carry: Any, xs: tuple[Any, Any]) -> tuple[Any, None]:
            if period == 1:
                return run_layer(carry, xs, pattern[0], None, looped), None
            for place, kind in enumerate(pattern):
                carry = run_layer(carry, xs, kind, place, looped)
            return carry, None

        layers = weights, (0 if first is None else first) + jnp.arange(number)
        xs = layers if period == 1 else jax.tree.map(partial(split_periods, period=period), layers)
        if periods == 1:
            carry, _ = body(carry, jax.tree.map(lambda a: jax.lax.index_in_dim(a, 0, 0, False), xs))
        else:
            carry, _ = jax.lax.scan(body, carry, xs, unroll=self.unroll)
        for place in range(periods * period, number):
            carry = run_layer(carry, layers, pattern[place % period], place, looped=False)
        return carry


def logical_axes(model: nnx.Module) -> Any:
    """The tree of logical axis strings of a model's parameters; those of a stack begin with its
    axis.
    """
    stacks = {
        (*map(str, path), STACKED): node.axis
        for path, node in nnx.iter_graph(model)
        if isinstance(node, Stack)
    }
    tree: dict[str, Any] = {}
    for path, param in nnx.to_flat_state(nnx.state(model)):
        *inner, last = map(str, path)
        at = tree
        for part in inner:
            at = at.setdefault(part, {})
        axes = [axis for place, axis in stacks.items() if tuple(inner[: len(place)]) == place]
        at[last] = " ".join([*axes, param.axes])
    return tree


def split_periods(array: jax.Array, period: int) -> jax.Array:
    """[L, ...] -> [periods, period, ...]; a copy only where the period does not divide L."""
    periods = len(array) // period
    return array[: periods * period].reshape(periods, period, *array.shape[1:])
