"""Zeros that stay: where a weight is zero its gradient, its moments and its update are zero, too.

The zeros of a weight are the mask: no other array is kept, a checkpoint has the same tensors with
and without, and a pruned checkpoint that is trained further needs nothing beside itself. A weight
that is zero by chance, or because it was drawn so, stays zero as well.

Weight decay of zero is zero. Muon's update of a matrix is dense whatever the gradient is, and so
are those of GaLore and APOLLO: it is the update that is masked, last of all. Moments in few bits
(adamw8bit) and of few dimensions are not set to zero: without a gradient they decay by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from training.naming import named

Tree = Any
Names = frozenset[str]
Make = Callable[[Tree], optax.GradientTransformation]


def without_gradient(grads: Tree, params: Tree, names: Names) -> Tree:
    """Gradients with zeros where a weight of `names` is zero, divided as the weights are.

    Args:
      grads: None where a parameter is frozen.
      params: all parameters.
    """
    weights = named(params)

    def masked(name: str, gradient: Array) -> Array:
        if name not in names:
            return gradient
        gradient = jax.reshard(gradient, jax.typeof(weights[name]).sharding.spec)
        return _where_zero(weights[name], gradient)

    found = [masked(name, gradient) for name, gradient in named(grads).items()]
    return jax.tree.unflatten(jax.tree.structure(grads), found)


def keeping_zeros(make: Make, names: Names) -> Make:
    """What makes, of logical axes, an optimizer that leaves zeros of some parameters as they are.

    Its state is that of the optimizer which `make` makes, with moments of zero where the weight is
    zero.

    Args:
      make: logical axes -> an optimizer.
      names: canonical names of the parameters.
    """

    def made(axes: Tree) -> optax.GradientTransformationExtraArgs:
        inner = optax.with_extra_args_support(make(axes))

        def update(
            updates: Tree, state: Tree, params: Tree = None, **extra: Any
        ) -> tuple[Tree, Tree]:
            weights = {name: array for name, array in named(params).items() if name in names}
            updates, state = inner.update(updates, state, params, **extra)
            return _masked(updates, weights), _masked(state, weights)

        return optax.GradientTransformationExtraArgs(inner.init, update)

    return made if names else make


def _masked(tree: Tree, weights: Mapping[str, Array]) -> Tree:
    """The arrays of a tree that are a weight's by name and shape, zero where it is."""

    def masked(name: str, array: Array) -> Array:
        for own, weight in weights.items():
            mine = name == own or name.endswith(f"/{own}")
            if mine and array.shape == weight.shape:
                return _where_zero(weight, array)
        return array

    found = [masked(name, array) for name, array in named(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def _where_zero(weight: Array, array: Array) -> Array:
    return jnp.where(weight == 0, jnp.zeros_like(array), array)
