"""A layer's computation, traced once and cut into forward, input gradient and weight gradient.

A pipeline runs the three in different ticks, in branches of one loop: what one leaves for another
travels through buffers, so what that is must be known. `jax.vjp` of a layer is traced to a list of
equations, each of which has a level, that of what it depends on:

| level | depends on | where it is computed |
| --- | --- | --- |
| 0 | the micro-batch alone: masks, rotations, keys | in each action, once for all layers |
| 1 | weights, the layer's number: gathered weights, dropout | in each action that reads it |
| 2 | the input x | forward; what the gradients read of it is `kept` |
| 3 | the cotangent dy | input gradient; what the weight gradient reads of it is `pending` |

Under a rematerialisation policy the equations that compute again are there as the policy wrote
them, and read only what it saves. Where W is an action of its own, `weight_grad` repeats nothing of
`input_grad`: that is the split of Zero Bubble Pipeline Parallelism (Qi et al. 2024,
https://arxiv.org/abs/2401.10241).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from parallel.equations import Equations, Variable

Arrays = Sequence[jax.Array]
MICROBATCH, WEIGHTS, INPUT, COTANGENT = range(4)


class Split:
    """The parts of a function (weights, others, x, number, index) -> y like x.

    Args:
      function: to cut; may close over arrays, which count as the micro-batch's.
      weights: lists its arrays that are differentiated.
      others: those that are not.
      x: its input, or a shape with sharding.

    `number` and `index` are int32 scalars: of the layer, and of the micro-batch.

    Attributes:
      kept: shapes with shardings of what `forward` leaves for the gradients.
      pending: of what `input_grad` leaves for `weight_grad`.
    """

    def __init__(
        self, function: Callable[..., jax.Array], weights: Arrays, others: Arrays, x: Any
    ) -> None:
        count = len(weights)

        def both(index: Any, number: Any, x: Any, dy: Any, *arrays: Any) -> tuple[Any, ...]:
            own, others = list(arrays[:count]), list(arrays[count:])
            y, back = jax.vjp(lambda w, x: function(w, others, x, number, index), own, x)
            gradients, dx = back(dy)
            return y, dx, *gradients

        scalar = jax.ShapeDtypeStruct((), "int32")
        self._equations = graph = Equations(both, [scalar, scalar, x, x, *weights, *others])
        index, number, x_in, dy, *arrays = graph.inputs
        y, dx, *gradients = graph.results
        level = graph.levels(
            dict.fromkeys([*graph.constants, index], MICROBATCH)
            | dict.fromkeys([*arrays, number], WEIGHTS)
            | {x_in: INPUT, dy: COTANGENT}
        )
        roots = {*graph.constants, index, number, *arrays}

        def outer(v: Variable) -> bool:  # what every part is given
            return v in roots or level[v] == MICROBATCH

        def cut(
            targets: list[Any], border: set[Variable], at: int, given: set[Variable]
        ) -> list[Variable]:
            """What is taken from one part to the next, of those in `border`."""
            _, found = graph.needed(
                targets,
                lambda v: outer(v) or v in given or (v in border and not graph.is_form(v, level)),
            )
            return graph.fewer(
                [v for v in found if level[v] == at and v not in given],
                lambda v: level[v] <= WEIGHTS or v in given,
            )

        def made(targets: list[Any], root: Variable, given: set[Variable]) -> set[Variable]:
            """What depends on `root` and is computed for targets, with the root."""
            eqns, _ = graph.needed(targets, lambda v: outer(v) or v is root or v in given)
            mine = (v for eqn in eqns for v in eqn.outvars if level[v] == level[root])
            return {root, *mine}

        kept = cut([dx, *gradients], made([y], x_in, set()), INPUT, {dy})
        pending = cut(gradients, made([dx], dy, {*kept}), COTANGENT, {*kept})
        self.kept, self.pending = [_shape(v) for v in kept], [_shape(v) for v in pending]

        parts = (
            ([x_in], [y, *kept]),
            ([*kept, dy], [dx, *gradients]),
            ([*kept, dy], [dx, *pending]),
            ([*kept, *pending], gradients),
        )
        # Level 0, computed once in an action; what is used of it differs, XLA drops the rest.
        shared = dict.fromkeys(
            v
            for inputs, outputs in parts
            for v in graph.needed(outputs, lambda v: outer(v) or v in inputs)[1]  # noqa: B023
            if v not in roots and v not in inputs
        )
        self._shared = graph.part([*graph.constants, index], list(shared))
        given = [*graph.constants, index, *shared, *arrays, number]
        self._forward, self._backward, self._input_grad, self._weight_grad = (
            graph.part([*given, *inputs], outputs) for inputs, outputs in parts
        )

    def at(self, index: jax.Array) -> list[jax.Array]:
        """What all layers share of a micro-batch: the first argument of the parts."""
        known = [*self._equations.consts, index]
        return known + self._shared(known)

    def forward(
        self, shared: Arrays, weights: Arrays, number: jax.Array, x: jax.Array
    ) -> tuple[jax.Array, list[jax.Array]]:
        """(y, what is kept); `weights` are both lists, one after the other."""
        y, *kept = self._forward([*shared, *weights, number, x])
        return y, kept

    def backward(
        self, shared: Arrays, weights: Arrays, number: jax.Array, kept: Arrays, dy: jax.Array
    ) -> tuple[jax.Array, list[jax.Array]]:
        """(dx, gradients of the weights), from what `forward` kept."""
        dx, *gradients = self._backward([*shared, *weights, number, *kept, dy])
        return dx, gradients

    def input_grad(
        self, shared: Arrays, weights: Arrays, number: jax.Array, kept: Arrays, dy: jax.Array
    ) -> tuple[jax.Array, list[jax.Array]]:
        """(dx, what is pending)."""
        dx, *pending = self._input_grad([*shared, *weights, number, *kept, dy])
        return dx, pending

    def weight_grad(
        self, shared: Arrays, weights: Arrays, number: jax.Array, kept: Arrays, pending: Arrays
    ) -> list[jax.Array]:
        """The gradients of the weights."""
        return self._weight_grad([*shared, *weights, number, *kept, *pending])


def _shape(v: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=v.aval.sharding)
