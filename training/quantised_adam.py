"""Adam whose moments of matrices are kept in 8 or 4 bits (`training/blocks.py`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from training.blocks import FIRST, SECOND, Coding, read, write, zeros
from training.matrices import matrix_dims

Tree = Any


class QuantisedState(NamedTuple):
    """Both moments: {"codes", "scales"} of a matrix, {"full"}, float32, of a vector."""

    step: Array
    mu: Tree
    nu: Tree


def scale_by_quantised_adam(
    axes: Tree, *, bits: int, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """Adam's direction from moments that are kept in few bits between steps.

    An update reads them, adds the gradient in float32, takes the direction of these sums and
    rounds them to the nearest codes of blocks with new scales. Gains and biases, which are few, are
    left in float32.

    Args:
      axes: logical axes of every parameter.
      bits: 8 or 4, of each moment.
      b1, b2, eps: of Adam.

    Sources: Dettmers et al. 2022, https://arxiv.org/abs/2110.02861 (8 bits); Li et al. 2023,
    https://arxiv.org/abs/2309.01507 (4 bits).
    """

    def init(params: Tree) -> QuantisedState:
        def empty(coding: Coding) -> Tree:
            def moment(p: Array, names: str) -> dict[str, Array]:
                if matrix_dims(names) is None:
                    return {"full": jnp.zeros_like(p, jnp.float32)}
                return zeros(coding, names, p)

            return jax.tree.map(moment, params, axes)

        return QuantisedState(jnp.zeros((), jnp.int32), empty(FIRST[bits]), empty(SECOND[bits]))

    def update(
        grads: Tree, state: QuantisedState, params: Tree = None
    ) -> tuple[Tree, QuantisedState]:
        del params
        step = optax.safe_increment(state.step)
        steps = step.astype(jnp.float32)

        def one(
            g: Array, names: str, mu: dict[str, Array], nu: dict[str, Array]
        ) -> tuple[Array, dict[str, Array], dict[str, Array]]:
            wide = g.astype(jnp.float32)

            def moment(
                coding: Coding, kept: dict[str, Array], decay: float, new: Array
            ) -> tuple[Array, dict[str, Array]]:
                whole = "full" in kept
                old = kept["full"] if whole else read(coding, names, kept, g)
                sums = decay * old + (1.0 - decay) * new
                return sums, {"full": sums} if whole else write(coding, names, sums)

            first, mu = moment(FIRST[bits], mu, b1, wide)
            second, nu = moment(SECOND[bits], nu, b2, jnp.square(wide))
            root = jnp.sqrt(second / (1.0 - b2**steps)) + eps
            return (first / (1.0 - b1**steps) / root).astype(g.dtype), mu, nu

        leaves = jax.tree.leaves(grads)
        structure: Any = jax.tree.structure(grads)
        found = [
            one(*of_leaf)
            for of_leaf in zip(
                leaves,
                *(structure.flatten_up_to(tree) for tree in (axes, state.mu, state.nu)),
                strict=True,
            )
        ]
        updates, mu, nu = (structure.unflatten([f[i] for f in found]) for i in range(3))
        return updates, QuantisedState(step, mu, nu)

    return optax.GradientTransformation(init, update)
