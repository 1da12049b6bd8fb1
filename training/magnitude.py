"""The weights of the smallest magnitude made zero: of each matrix, of all together, or as 2:4.

Han et al. 2015, https://arxiv.org/abs/1506.02626. What is chosen is exact and the same on every
layout (`training.smallest`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from parallel.fours import left_out
from parallel.rules import STACKS
from parallel.stored import SEVERAL
from training.smallest import (
    Limits,
    Matrices,
    halves,
    limits_of_all,
    limits_of_each,
    magnitude_keys,
    taken,
)

SCOPES = ("layer", "global")
PATTERNS = ("unstructured", "2:4")
Numbers = Mapping[str, tuple[Any, Any]]


def numbers(weights: Mapping[str, Any], axes: Mapping[str, str], share: float, scope: str) -> Any:
    """How many weights are to be zero, as `with_zeros` takes it: of each matrix, or of all.

    Args:
      weights: canonical name -> anything with a shape.
      axes: the same names -> logical axes.
      share: of the weights, in [0, 1].
      scope: layer or global.
    """
    if scope == "global":
        return {"": halves(round(share * sum(w.size for w in weights.values())))}
    found = {}
    for name, weight in weights.items():
        matrices = 1
        for size in weight.shape[: lead_of(axes[name])]:
            matrices *= size
        found[name] = halves(round(share * (weight.size // matrices)))
    return found


def with_zeros(
    weights: Mapping[str, Array],
    axes: Mapping[str, str],
    number: Numbers | None,
    *,
    scope: str = "layer",
    pattern: str = "unstructured",
) -> dict[str, Array]:
    """The weights, those of the smallest magnitude zero.

    Args:
      weights: canonical name -> array, divided in any way.
      axes: the same names -> logical axes.
      number: of `numbers`; whole numbers or int32 arrays, for 2:4 at most half. None: of 2:4 all
        that it leaves out.
      scope: layer or global.
      pattern: unstructured, or 2:4: chosen among the two smallest of every four rows.
    """
    if number is None:
        assert pattern == "2:4"
        every = _matrices(weights, axes, pattern)
        return _without(weights, {name: matrices.allowed for name, matrices in every.items()})
    found = limits(weights, axes, number, scope=scope, pattern=pattern)
    return within(weights, axes, found, pattern=pattern)


def limits(
    weights: Mapping[str, Array],
    axes: Mapping[str, str],
    number: Numbers,
    *,
    scope: str = "layer",
    pattern: str = "unstructured",
) -> dict[str, Limits]:
    """Which weights `with_zeros` makes zero, for `within`: scalars of each matrix.

    Args:
      weights: as there; axes, number, scope and pattern, too.
    """
    every = _matrices(weights, axes, pattern)
    as_int = lambda pair: tuple(jnp.asarray(part, jnp.int32) for part in pair)
    if scope == "global":
        high, low = as_int(number[""])
        found = limits_of_all(list(every.values()), (high, low))
    else:
        pairs = [as_int(number[name]) for name in every]
        found = limits_of_each(list(every.values()), [(h << 16) + low for h, low in pairs])
    return dict(zip(every, found, strict=True))


def within(
    weights: Mapping[str, Array],
    axes: Mapping[str, str],
    limits: Mapping[str, Limits],
    *,
    pattern: str = "unstructured",
) -> dict[str, Array]:
    """The weights, those within the limits zero: of all layers, or of one with its limits."""
    every = _matrices(weights, axes, pattern)
    masks = taken(list(every.values()), [limits[name] for name in every])
    return _without(weights, dict(zip(every, masks, strict=True)))


def _matrices(
    weights: Mapping[str, Array], axes: Mapping[str, str], pattern: str
) -> dict[str, Matrices]:
    """In the order of their names, in which equal numbers are taken."""

    def matrices(name: str) -> Matrices:
        w, names, allowed = weights[name], axes[name], None
        if pattern == "2:4":
            allowed = left_out(magnitude_keys(w), inner_row_dim(names))
        return Matrices(w, lead_of(names), allowed)

    return {name: matrices(name) for name in sorted(weights)}


def _without(weights: Mapping[str, Array], masks: Mapping[str, Any]) -> dict[str, Array]:
    return {
        name: jnp.where(mask, jnp.zeros_like(weights[name]), weights[name])
        for name, mask in masks.items()
    }


def lead_of(names: str) -> int:
    """Leading dims of a weight that count matrices: layers and experts."""
    return sum(name in (*STACKS, *SEVERAL) for name in names.split())


def inner_row_dim(names: str) -> int:
    """The last of a weight's contracted dims: neighbours in it are neighbouring rows."""
    return len(names.partition("->")[0].split()) - 1


def check_fours(name: str, shape: tuple[int, ...], names: str, key: str) -> None:
    """Refuses a matrix whose rows are no fours.

    Raises:
      ValueError: naming the key.
    """
    size = shape[inner_row_dim(names)]
    if size % 4:
        dim = names.partition("->")[0].split()[-1]
        raise ValueError(f"{key} = '2:4': {name} has {size} rows along {dim}, no multiple of 4")
