"""Which of every four rows of a matrix the 2:4 pattern leaves out, of arrays divided in any way."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P


def left_out(scores: Array, dim: int) -> Array:
    """Whether a number is one of the two smallest of its four along `dim`; of equal ones the last.

    Args:
      scores: any that are ordered; the size of `dim` is a multiple of 4.

    Returns:
      bool, of the shape of `scores` and divided as they are. What `parallel.two_of_four` keeps of
      magnitudes is the rest.
    """
    spec = _entries(scores)
    size = scores.shape[dim]
    if (size // _parts(scores, spec[dim])) % 4:  # fours lie on two devices
        spec = (*spec[:dim], None, *spec[dim + 1 :])
    fours = _reshaped(
        _divided(scores, spec),
        (*scores.shape[:dim], size // 4, 4, *scores.shape[dim + 1 :]),
        (*spec[: dim + 1], None, *spec[dim + 1 :]),
    )
    place = jnp.arange(4).reshape([4 if d == dim + 1 else 1 for d in range(fours.ndim)])
    before = jnp.zeros_like(fours, jnp.int32)  # how many of the four are kept before this one
    for other in range(4):
        one = jax.lax.slice_in_dim(fours, other, other + 1, axis=dim + 1)
        before = before + ((one > fours) | ((one == fours) & (other < place)))
    return _divided(_reshaped(before >= 2, scores.shape, spec), _entries(scores))


def _entries(array: Array) -> tuple[Any, ...]:
    spec = tuple(jax.typeof(array).sharding.spec)
    return spec + (None,) * (array.ndim - len(spec))


def _parts(array: Array, entry: Any) -> int:
    axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
    return math.prod(jax.typeof(array).sharding.mesh.shape[axis] for axis in axes)


def _divided(array: Array, spec: tuple[Any, ...]) -> Array:
    if jax.typeof(array).sharding.mesh.empty:
        return array
    return jax.reshard(array, P(*spec))


def _reshaped(array: Array, shape: tuple[int, ...], spec: tuple[Any, ...]) -> Array:
    if jax.typeof(array).sharding.mesh.empty:
        return array.reshape(shape)
    return jax.lax.reshape(array, shape, out_sharding=P(*spec))
