"""L blocks as one: parameters with a leading layer axis, built by `vmap` and run by `lax.scan`.

Compile time does not grow with depth, and XLA:CPU honours rematerialisation only inside a loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from parallel.remat import RematConfig, remat

# The attribute of a Stack, and the name in a checkpoint, below which arrays are [L, ...].
STACKED = "blocks"


class Stack(nnx.Module):
    """L blocks of one form.

    Args:
      make_block: rngs -> a block; called once, under vmap.
      layers: L.
      pattern: the static kind of every layer, repeated over the depth; a loop iteration runs one
        period, so that a kind (a window, say) is known when its code is compiled.
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
    ) -> None:
        graphs: list[Any] = []

        def make(key: jax.Array) -> nnx.State:
            graph, state = nnx.split(make_block(nnx.Rngs(params=key)))
            graphs.append(graph)
            return state

        state = jax.vmap(make)(jax.random.split(rngs.params(), layers))
        self.blocks = nnx.merge(graphs[0], state)
        self.layers, self.pattern, self.remat, self.unroll = layers, pattern, remat, unroll

    def run(
        self,
        apply: Callable[[Any, Any, jax.Array | None, Any], Any],
        carry: Any,
        key: jax.Array | None = None,
        first: int | jax.Array = 0,
    ) -> Any:
        """Runs the blocks in order: all of them, or those that the weights are of.

        Args:
          apply: (block, carry, key of the layer, kind of the layer) -> carry.
          carry: any tree of arrays, the residual stream at least.
          key: folded with the layer's number, so that it knows nothing of loops; None stays None.
          first: the number of the first of these layers in the model, a multiple of the pattern's
            period.

        Returns:
          The carry after the last layer.
        """
        graph, state = nnx.split(self.blocks)
        weights = nnx.to_pure_dict(state)
        number = len(jax.tree.leaves(weights)[0])
        pattern, period = self.pattern, len(self.pattern)
        periods = number // period
        looped = periods > self.unroll  # else the scan is no loop in the compiled program

        def run_layer(
            carry: Any, xs: tuple[Any, Any], kind: Any, place: int | None, looped: bool
        ) -> Any:
            def layer(carry: Any, xs: tuple[Any, Any]) -> Any:
                if (
                    place is not None
                ):  # here and not before, or the cut is kept for the backward pass
                    xs = jax.tree.map(lambda a: jax.lax.index_in_dim(a, place, 0, False), xs)
                weights, index = xs
                layer_key = None if key is None else jax.random.fold_in(key, index)
                return apply(nnx.merge(graph, weights), carry, layer_key, kind)

            return remat(layer, self.remat, looped=looped, slices=place is not None)(carry, xs)

        def body(carry: Any, xs: tuple[Any, Any]) -> tuple[Any, None]:
            if period == 1:
                return run_layer(carry, xs, pattern[0], None, looped), None
            for place, kind in enumerate(pattern):
                carry = run_layer(carry, xs, kind, place, looped)
            return carry, None

        layers = weights, first + jnp.arange(number)
        xs = layers if period == 1 else jax.tree.map(partial(split_periods, period=period), layers)
        if periods == 1:
            carry, _ = body(carry, jax.tree.map(lambda a: jax.lax.index_in_dim(a, 0, 0, False), xs))
        else:
            carry, _ = jax.lax.scan(body, carry, xs, unroll=self.unroll)
        for place in range(periods * period, number):
            carry = run_layer(carry, layers, pattern[place % period], place, looped=False)
        return carry


def split_periods(array: jax.Array, period: int) -> jax.Array:
    """[L, ...] -> [periods, period, ...]; a copy only where the period does not divide L."""
    periods = len(array) // period
    return array[: periods * period].reshape(periods, period, *array.shape[1:])
