"""What a forward pass keeps for its backward pass, as arrays that outlive the trace of either.

`jax.vjp` gives a function that is a pytree: its leaves are the residuals, all else is static. Here
the two halves are traced apart (in branches of a loop), so the leaves travel through buffers. Those
that are weights do not: both halves have them. A weight that was reshaped or cast within the
function is not recognised and would be kept, once a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

Arrays = list[jax.Array]


class Residuals:
    """The residuals of a function of (weights, other weights, x); only the other are constants.

    Attributes:
      shapes: of what is to be kept, with shardings.
    """

    shapes: list[Any]

    def __init__(
        self, function: Callable[..., jax.Array], weights: Arrays, others: Arrays, x: Any
    ) -> None:
        self.tree: Any = None
        self.shapes = jax.eval_shape(
            lambda weights, others, x: self.forward(function, weights, others, x)[1],
            weights,
            others,
            x,
        )

    def forward(
        self, function: Callable[..., jax.Array], weights: Arrays, others: Arrays, x: jax.Array
    ) -> tuple[jax.Array, Arrays]:
        """The function's value, and what is to be kept."""
        y, back = jax.vjp(lambda weights, x: function(weights, others, x), weights, x)
        leaves, tree = jax.tree.flatten(back)
        known = {id(array): place for place, array in enumerate([*weights, *others])}
        kept: dict[int, jax.Array] = {}  # what is read twice is kept once
        sources = []
        for leaf in leaves:
            if id(leaf) in known:
                sources.append((True, known[id(leaf)]))
            else:
                kept.setdefault(id(leaf), leaf)
                sources.append((False, list(kept).index(id(leaf))))
        if self.tree is None:
            self.tree, self.sources = tree, sources
            self.keys = [_is_key(array) for array in kept.values()]
        assert self.sources == sources, "both traces find the same residuals"
        return y, [jax.random.key_data(a) if _is_key(a) else a for a in kept.values()]

    def backward(
        self, kept: Sequence[jax.Array], weights: Arrays, others: Arrays, dy: jax.Array
    ) -> tuple[Arrays, jax.Array]:
        """The gradients by the weights and by x."""
        arrays = [
            jax.random.wrap_key_data(a) if is_key else a
            for a, is_key in zip(kept, self.keys, strict=True)
        ]
        known = [*weights, *others]
        leaves = [known[n] if weight else arrays[n] for weight, n in self.sources]
        return self.tree.unflatten(leaves)(dy)


def _is_key(array: jax.Array) -> bool:
    return jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
