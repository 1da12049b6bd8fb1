"""Weights made zero after training: what all methods have in common, and magnitude.

A mask is the zeros of a weight. Zeros save neither memory nor time until they are stored packed
(2:4, `config.weights.forms`) or removed with whole heads, channels and layers (`compress.shrink`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parallel.rules import is_stacked, of_one_layer
from training.magnitude import (
    PATTERNS,
    SCOPES,
    check_fours,
    limits,
    numbers,
    with_zeros,
    within,
)
from training.naming import named
from training.smallest import Limits

Tree = Any


def check_share(sparsity: float, pattern: str, key: str = "--sparsity") -> None:
    """Refuses a share of zeros that is none.

    Raises:
      ValueError: naming the key, its value and what would be right.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern {pattern!r}: choose one of {', '.join(PATTERNS)}")
    if not 0 < sparsity < 1:  # NaN, too
        raise ValueError(f"{key}={sparsity}: the share of weights to make zero, in (0, 1)")
    if pattern == "2:4" and sparsity != 0.5:
        raise ValueError(f"{key}={sparsity}: 2:4 makes two of every four zero; leave it at 0.5")


def prune_by_magnitude(
    params: Tree,
    axes: Tree,
    names: Collection[str],
    sparsity: float,
    *,
    scope: str = "layer",
    pattern: str = "unstructured",
) -> Iterator[tuple[str, int, jax.Array]]:
    """Matrices with their smallest weights zero, one layer of one matrix after the other.

    Exact, and the same weights on every layout; nothing is sorted or copied to one device.

    Args:
      params: at rest, divided in any way, or NumPy; call it under the mesh.
      axes: the same tree of logical axes.
      names: canonical names of the matrices.
      sparsity: the share of zeros, in (0, 1).
      scope: layer (this share of every matrix of a layer) or global (one threshold for all).
      pattern: unstructured or 2:4.

    Yields:
      Name, layer (0 outside of stacks), and array of that layer, divided as it was.

    Raises:
      ValueError: a share, scope or pattern that cannot be.

    Source: Han et al. 2015, https://arxiv.org/abs/1506.02626.
    """
    check_share(sparsity, pattern)
    if scope not in SCOPES:
        raise ValueError(f"scope {scope!r}: choose one of {', '.join(SCOPES)}")
    chosen = {name: jnp.asarray(array) for name, array in named(params).items() if name in names}
    own = {name: a for name, a in named(axes).items() if name in names}
    if pattern == "2:4":
        for name, array in chosen.items():
            check_fours(name, array.shape, own[name], "pattern")
    of_all = {}
    if scope == "global" and pattern != "2:4":
        number = numbers(chosen, own, sparsity, scope)
        of_all = jax.jit(partial(limits, axes=own, number=number, scope=scope))(chosen)
    for name, array in chosen.items():
        names_of_one = {name: of_one_layer(own[name])}
        if of_all:
            run = jax.jit(partial(within, axes=names_of_one))
        else:
            shapes = {name: jax.ShapeDtypeStruct(_one(array, own[name], 0).shape, array.dtype)}
            number = None if pattern == "2:4" else numbers(shapes, names_of_one, sparsity, scope)
            run = jax.jit(partial(with_zeros, axes=names_of_one, number=number, pattern=pattern))
        for layer in range(len(array) if is_stacked(own[name]) else 1):
            one = {name: _one(array, own[name], layer)}
            given = {}
            if of_all:
                limit = [_one(a, own[name], layer) for a in of_all[name]]
                given = {"limits": {name: Limits(*limit)}}
            yield name, layer, run(one, **given)[name]


def _one(array: Any, names: str, layer: int) -> Any:
    return array[layer] if is_stacked(names) else array


def smallest_of_columns(scores_KM: np.ndarray, sparsity: float) -> np.ndarray:
    """Whether a score is one of the smallest of its column, bool [K, M]; the first of equal ones.

    Args:
      sparsity: the share of every column.
    """
    number = round(sparsity * len(scores_KM))
    order = np.argsort(scores_KM, axis=0, kind="stable")[:number]
    mask = np.zeros(scores_KM.shape, bool)
    np.put_along_axis(mask, order, True, axis=0)
    return mask


def smallest_of_fours(scores_KM: np.ndarray) -> np.ndarray:
    """Whether a score is one of the two smallest of its four rows; of equal ones the last.

    Raises:
      ValueError: the rows are no fours.
    """
    rows, columns = scores_KM.shape
    if rows % 4:
        raise ValueError(f"2:4: {rows} rows are no multiple of 4; choose an unstructured pattern")
    fours = scores_KM.reshape(rows // 4, 4, columns)
    kept = np.argsort(-fours, axis=1, kind="stable")[:, :2]
    mask = np.ones(fours.shape, bool)
    np.put_along_axis(mask, kept, False, axis=1)
    return mask.reshape(rows, columns)
