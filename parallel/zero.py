"""From master parameters at rest to the copy in compute dtype for the model, by ZeRO level.

Level 3 gives the model divided weights: a contraction gathers the weight it needs, and autodiff
keeps the divided one as residual. Levels 1 and 2 gather everything once a step. At level 2 the
gradients must still leave each layer divided: resharding the whole gradient afterwards would hold
it whole first, so a weight travels as a `Twin` whose gradient goes to the divided half, inside the
scanned layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from parallel.exchange import to_rows, to_spread
from parallel.gather import gather
from parallel.rules import Rules, is_staged
from parallel.stored import cast
from parallel.twin import Twin

Tree = Any


def for_model(
    params: Tree, axes: Tree, rules: Rules, dtype: str
) -> tuple[Tree, Callable[[Tree], Tree]]:
    """Casts the master parameters and lays them out for the model.

    With the stages of a pipeline this is for the model as a whole, in evaluation: layers are spread
    over the stages and gathered where they are used, one at a time.

    Args:
      params: master parameters, divided as `rules.at_rest`.
      axes: the same tree of logical axis strings.
      rules: the layout.
      dtype: compute dtype.

    Returns:
      (leaves, build): differentiate a function of `leaves`; `build(leaves)` is what the model
      takes. The gradients come out as `rules.of_gradient` says, in `dtype`.
    """
    if rules.staged:
        return jax.tree.map(
            partial(_spread, rules), cast(params, dtype), axes
        ), lambda leaves: leaves
    leaves, copy = laid_out(params, axes, rules, dtype)
    return leaves, lambda leaves: together(leaves, copy)


def _spread(rules: Rules, array: jax.Array, names: str) -> jax.Array:
    if not is_staged(names):
        return jax.reshard(array, rules.in_model(names, array.shape))
    spec = rules.spread(names, array.shape)
    return to_spread(array, spec, range(len(array))) if rules.rows else jax.reshard(array, spec)


def laid_out(
    params: Tree, axes: Tree, rules: Rules, dtype: str, rows: Sequence[int] | None = None
) -> tuple[Tree, Tree | None]:
    """What `for_model` differentiates, and the whole copy beside it at level 2.

    Args:
      rows: the order of layers that the stages of a pipeline want (`Division.rows`), if it is not
        that in which the parameters are at rest.
    """

    def own(array: jax.Array, names: str) -> jax.Array:
        if rows is None or not is_staged(names):
            return array
        return to_rows(array, rules.spread(names, array.shape), rows)

    used = jax.tree.map(own, cast(params, dtype), axes)
    lay_out = gather if rules.zero == 2 else jax.reshard

    def in_model(array: jax.Array, names: str) -> jax.Array:
        return lay_out(array, rules.in_model(names, array.shape))

    def in_stage(array: jax.Array, names: str) -> jax.Array:
        return jax.reshard(array, rules.in_stage(names, array.shape))

    copy = jax.tree.map(in_model, used, axes)
    return (jax.tree.map(in_stage, used, axes), copy) if rules.zero == 2 else (copy, None)


def together(leaves: Tree, copy: Tree | None) -> Tree:
    """What the model takes, of both parts of `laid_out`."""
    return leaves if copy is None else jax.tree.map(Twin, copy, leaves)


def zeros_like_gradients(params: Tree, axes: Tree, rules: Rules, dtype: str) -> Tree:
    """A buffer to sum gradients in, divided as `rules.of_gradient`."""

    def zeros(array: jax.Array, names: str) -> jax.Array:
        return jnp.zeros(array.shape, dtype, out_sharding=rules.of_gradient(names, array.shape))

    return jax.tree.map(zeros, params, axes)
