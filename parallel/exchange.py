"""Stacked arrays between two layouts: all layers on every stage, or each stage's own layers.

`Rules.spread` gives every stage a part of each layer, which suits what is done with all layers in
the model's order: the update of the optimizer, checkpoints, evaluation. A stage of a pipeline
computes with whole layers, its own ones: rows. One all-to-all over `pipe` goes from one to the
other, and no device ever holds more than its share. Left to itself XLA gathers the whole array on
every stage where it has to permute a divided dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from parallel.contract import axes_of, without
from parallel.mesh import PIPE


def to_rows(array: jax.Array, spec: P, rows: Sequence[int]) -> jax.Array:
    """[L, ...] divided as `spec`, a `Rules.spread` -> [rows, ...] divided over stages.

    Args:
      rows: the layer of each row, as many for every stage; -1 where any will do.
    """
    taken = np.maximum(np.asarray(rows), 0)
    dim = _dim(spec)

    def local(x: jax.Array) -> jax.Array:
        if dim is None:
            own = jnp.asarray(taken).reshape(lax.axis_size(PIPE), -1)[lax.axis_index(PIPE)]
            return _taken(x, own)
        return lax.all_to_all(_taken(x, taken), PIPE, 0, dim, tiled=True)

    return _by_device(local, spec, by_rows(spec))(jax.reshard(array, spec))


def to_spread(array: jax.Array, spec: P, rows: Sequence[int]) -> jax.Array:
    """The way back: [rows, ...] divided over stages -> [L, ...] divided as `spec`."""
    number = max(rows) + 1
    places = np.asarray([list(rows).index(layer) for layer in range(number)])
    dim = _dim(spec)

    def local(x: jax.Array) -> jax.Array:
        if dim is None:
            # Small: nothing of it divides.
            return _taken(lax.all_gather(x, PIPE, axis=0, tiled=True), places)
        return _taken(lax.all_to_all(x, PIPE, dim, 0, tiled=True), places)

    return _by_device(local, by_rows(spec), spec)(jax.reshard(array, by_rows(spec)))


def by_rows(spec: P) -> P:
    """The partition of the rows: that of a spread array with `pipe` moved to the first dim."""
    return P(PIPE, *(without(entry, (PIPE,)) for entry in spec[1:]))


def _dim(spec: P) -> int | None:
    """The dim that `pipe` divides, if there is one that it does."""
    return next((dim for dim, entry in enumerate(spec) if PIPE in axes_of([entry])), None)


def _taken(array: jax.Array, rows: np.ndarray | jax.Array) -> jax.Array:
    return array.at[rows].get(mode="promise_in_bounds")


def _by_device(
    function: Callable[[jax.Array], jax.Array], in_spec: P, out_spec: P
) -> Callable[[jax.Array], jax.Array]:
    # Manual over all axes: what is not divided over one is the same on its devices.
    return jax.shard_map(function, in_specs=in_spec, out_specs=out_spec, check_vma=False)
