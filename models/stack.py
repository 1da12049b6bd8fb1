"""L blocks as one: parameters with a leading layer axis, built by `vmap` and run by `lax.scan`.

Compile time does not grow with depth, and XLA:CPU honours rematerialisation only inside a loop.
"""

from __future__ import annotations

from collections.abc import Callable
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
    ) -> Any:
        """Runs the blocks in order.

        Args:
          apply: (block, carry, key of the layer, kind of the layer) -> carry.
          carry: any tree of arrays, the residual stream at least.
          key: folded with the layer's number, so that it knows nothing of loops; None stays None.

        Returns:
          The carry after the last layer.
        """
        graph, state = nnx.split(self.blocks)
        weights = nnx.to_pure_dict(state)

        def run_layer(carry: Any, xs: tuple[Any, Any], kind: Any, looped: bool) -> Any:
            def layer(carry: Any, weights: Any, index: jax.Array) -> Any:
                layer_key = None if key is None else jax.random.fold_in(key, index)
                return apply(nnx.merge(graph, weights), carry, layer_key, kind)

            return remat(layer, self.remat, looped=looped)(carry, *xs)

        period, indices = len(self.pattern), jnp.arange(self.layers)
        periods, left = divmod(self.layers, period)
        looped = periods > self.unroll  # else the scan is no loop in the compiled program
        if period == 1:
            (kind,) = self.pattern

            def body(carry: Any, xs: tuple[Any, jax.Array]) -> tuple[Any, None]:
                return run_layer(carry, xs, kind, looped), None

            carry, _ = jax.lax.scan(body, carry, (weights, indices), unroll=self.unroll)
            return carry

        def body_of_period(carry: Any, xs: tuple[Any, jax.Array]) -> tuple[Any, None]:
            for i, kind in enumerate(self.pattern):
                carry = run_layer(carry, jax.tree.map(lambda a, i=i: a[i], xs), kind, looped)
            return carry, None

        xs = jax.tree.map(lambda a: split_periods(a, periods, period), (weights, indices))
        carry, _ = jax.lax.scan(body_of_period, carry, xs, unroll=self.unroll)
        for i in range(self.layers - left, self.layers):
            one = jax.tree.map(lambda a, i=i: a[i], (weights, indices))
            carry = run_layer(carry, one, self.pattern[i % period], looped=False)
        return carry


def split_periods(array: jax.Array, periods: int, period: int) -> jax.Array:
    """[L, ...] -> [periods, period, ...]; a copy only where the period does not divide L."""
    return array[: periods * period].reshape(periods, period, *array.shape[1:])
