"""From master parameters at rest to the copy in compute dtype for the model, by ZeRO level.

Level 3 gives the model divided weights: a contraction gathers the weight it needs, and autodiff
keeps the divided one as residual. Levels 1 and 2 gather everything once a step. At level 2 the
gradients must still leave each layer divided: resharding the whole gradient afterwards would hold
it whole first, so a weight travels as a `Twin` whose gradient goes to the divided half, inside the
scanned layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from parallel.gather import gather
from parallel.rules import Rules

Tree = Any


class Twin(NamedTuple):
    """One weight twice: `whole` is what is computed with, `part` is what is differentiated."""

    whole: jax.Array
    part: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _join(part_sharding: jax.sharding.Sharding, whole: jax.Array, part: jax.Array) -> jax.Array:
    return whole


def _join_forward(
    part_sharding: jax.sharding.Sharding, whole: jax.Array, part: jax.Array
) -> tuple[jax.Array, None]:
    return whole, None


def _join_backward(
    part_sharding: jax.sharding.Sharding, residuals: None, cotangent: jax.Array
) -> tuple[None, jax.Array]:
    return None, jax.reshard(cotangent, part_sharding)


_join.defvjp(_join_forward, _join_backward)


def joined(weight: jax.Array | Twin) -> jax.Array:
    """The array to compute with."""
    if isinstance(weight, Twin):
        return _join(jax.typeof(weight.part).sharding, weight.whole, weight.part)
    return weight


def whole(weight: jax.Array | Twin, spec: PartitionSpec) -> jax.Array:
    """The array to compute with, gathered over fsdp; `spec` is `Rules.gathered(...)`."""
    return jax.reshard(joined(weight), spec)


def for_model(
    params: Tree, axes: Tree, rules: Rules, dtype: str
) -> tuple[Tree, Callable[[Tree], Tree]]:
    """Casts the master parameters and lays them out for the model.

    Args:
      params: master parameters, divided as `rules.at_rest`.
      axes: the same tree of logical axis strings.
      rules: the layout.
      dtype: compute dtype.

    Returns:
      (leaves, build): differentiate a function of `leaves`; `build(leaves)` is what the model
      takes. The gradients come out as `rules.of_gradient` says, in `dtype`.
    """
    leaves, copy = laid_out(params, axes, rules, dtype)
    return leaves, lambda leaves: together(leaves, copy)


def laid_out(params: Tree, axes: Tree, rules: Rules, dtype: str) -> tuple[Tree, Tree | None]:
    """What `for_model` differentiates, and the whole copy beside it at level 2."""
    cast = jax.tree.map(lambda p: p.astype(dtype), params)

    lay_out = gather if rules.zero == 2 else jax.reshard

    def in_model(array: jax.Array, names: str) -> jax.Array:
        return lay_out(array, rules.in_model(names, array.shape))

    def in_stage(array: jax.Array, names: str) -> jax.Array:
        return jax.reshard(array, rules.in_stage(names, array.shape))

    copy = jax.tree.map(in_model, cast, axes)
    return (jax.tree.map(in_stage, cast, axes), copy) if rules.zero == 2 else (copy, None)


def together(leaves: Tree, copy: Tree | None) -> Tree:
    """What the model takes, of both parts of `laid_out`."""
    return leaves if copy is None else jax.tree.map(Twin, copy, leaves)


def zeros_like_gradients(params: Tree, axes: Tree, rules: Rules, dtype: str) -> Tree:
    """A buffer to sum gradients in, divided as `rules.of_gradient`."""

    def zeros(array: jax.Array, names: str) -> jax.Array:
        return jnp.zeros(array.shape, dtype, out_sharding=rules.of_gradient(names, array.shape))

    return jax.tree.map(zeros, params, axes)
