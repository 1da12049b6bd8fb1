"""The smallest of many numbers by magnitude, exactly, without sorting them or holding a copy.

The bits of a float32 without its sign are an integer that is ordered as the magnitude is. The
threshold below which k numbers lie is found by halving the range of those integers 31 times and
counting. Counts are integers, so that every layout finds the same numbers, bit for bit. Of equal
numbers the first ones are taken, in the order of the arrays, their matrices and the places in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

NEVER = 2**31 - 1  # above the bits of any float: what is not to be taken
_HALF = 16  # counts of many matrices are in two parts, for there are no 64-bit integers


@dataclass(frozen=True)
class Matrices:
    """An array of matrices to take numbers of.

    Attributes:
      array: [*lead, *dims of one matrix], divided in any way.
      lead: leading dims, which count matrices; of each fewer than 2**31 numbers.
      allowed: bool, of its shape; what else there is is never taken.
    """

    array: Array
    lead: int
    allowed: Array | None = None

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(range(self.lead, self.array.ndim))

    @property
    def spec(self) -> P:
        """How the dims that count matrices are divided."""
        return P(*tuple(jax.typeof(self.array).sharding.spec)[: self.lead])

    def key(self, along: Any) -> Array:
        """int32 in the order of |x|, made anew in each turn of a loop that carries `along`.

        Else XLA takes them out of the loop: an int32 copy of every weight.
        """
        array, _ = jax.lax.optimization_barrier((self.array, along))
        key = magnitude_keys(array)
        return key if self.allowed is None else jnp.where(self.allowed, key, jnp.int32(NEVER))

    def count(self, chosen: Array) -> Array:
        """How many of each matrix, int32 [*lead]."""
        return jnp.sum(chosen, self.dims, dtype=jnp.int32)

    def of_each(self, numbers: Array) -> Array:
        """[*lead] beside every number of its matrix."""
        return jnp.expand_dims(_divided(numbers, self.spec), self.dims)

    def places(self) -> Array:
        """The place of each number in its matrix, int32."""
        index = jnp.zeros_like(self.array, jnp.int32)
        stride = 1
        for dim in reversed(self.dims):
            size = self.array.shape[dim]
            shape = [size if d == dim else 1 for d in range(self.array.ndim)]
            index = index + (jnp.arange(size, dtype=jnp.int32) * stride).reshape(shape)
            stride *= size
        return index


def magnitude_keys(array: Array) -> Array:
    """int32 in the order of |x|; NaN is above infinity."""
    bits = jax.lax.bitcast_convert_type(array.astype(jnp.float32), jnp.int32)
    return bits & jnp.int32(NEVER)


class Limits(NamedTuple):
    """What is taken of each matrix of an array, int32 [*lead]: what is below the threshold, and the
    first `share` of what is equal to it.
    """

    threshold: Array
    share: Array


def limits_of_each(every: Sequence[Matrices], numbers: Sequence[Array]) -> list[Limits]:
    """Limits that take the smallest numbers of each matrix.

    Args:
      numbers: how many, an int32 scalar for the matrices of each array, at most as many as are
        allowed.
    """
    zeros = [m.count(jnp.zeros_like(m.array, bool)) for m in every]

    def enough(middles: list[Array]) -> list[Array]:
        return [
            m.count(m.key(middle) <= m.of_each(middle)) >= number
            for m, middle, number in zip(every, middles, numbers, strict=True)
        ]

    thresholds = _halved(enough, zeros, [z + NEVER for z in zeros])
    shares = [
        number - m.count(m.key(threshold) < m.of_each(threshold))
        for m, threshold, number in zip(every, thresholds, numbers, strict=True)
    ]
    return list(map(Limits, thresholds, shares))


def limits_of_all(every: Sequence[Matrices], number: tuple[Array, Array]) -> list[Limits]:
    """Limits that take the smallest numbers of all matrices of all arrays.

    Args:
      number: how many, as `halves` gives it.
    """
    wanted_high, wanted_low = number

    def counted(found: Sequence[Array]) -> tuple[Array, Array]:
        whole = [_divided(count, P()) for count in found]
        high = sum((jnp.sum(c >> _HALF) for c in whole), jnp.int32(0))
        low = sum((jnp.sum(c & (2**_HALF - 1)) for c in whole), jnp.int32(0))
        return high + (low >> _HALF), low & (2**_HALF - 1)

    def enough(middles: list[Array]) -> list[Array]:
        (middle,) = middles
        high, low = counted([m.count(m.key(middle) <= middle) for m in every])
        return [(high > wanted_high) | ((high == wanted_high) & (low >= wanted_low))]

    (threshold,) = _halved(enough, [jnp.int32(0)], [jnp.int32(NEVER)])
    high, low = counted([m.count(m.key(threshold) < threshold) for m in every])
    rest = ((wanted_high - high) << _HALF) + wanted_low - low
    limits = []
    for m in every:
        equal = _divided(m.count(m.key(threshold) == threshold), P())
        before = (jnp.cumsum(equal.reshape(-1)) - equal.reshape(-1)).reshape(equal.shape)
        share = jnp.clip(rest - before, 0, equal)
        # Zeros are zeros whether they are taken or not, and there may be more than int32 counts.
        share = jnp.where(threshold == 0, equal, share)
        limits.append(Limits(jnp.zeros_like(equal) + threshold, share))
        rest = jnp.maximum(rest - jnp.sum(equal), 0)
    return limits


def halves(number: int) -> tuple[int, int]:
    """A whole number below 2**47 as `limits_of_all` takes it."""
    return number >> _HALF, number & (2**_HALF - 1)


def taken(every: Sequence[Matrices], limits_of: Sequence[Limits]) -> list[Array]:
    """Whether a number is within the limits, bool of each array's shape and division."""
    thresholds = [_divided(of.threshold, m.spec) for m, of in zip(every, limits_of, strict=True)]
    shares = [_divided(of.share, m.spec) for m, of in zip(every, limits_of, strict=True)]
    limits = [m.of_each(t) for m, t in zip(every, thresholds, strict=True)]
    tied = [m.count(m.key(t) == x) for m, t, x in zip(every, thresholds, limits, strict=True)]
    zeros = [jnp.zeros_like(t) for t in tied]

    def enough(middles: list[Array]) -> list[Array]:
        found = []
        for m, middle, limit, share in zip(every, middles, limits, shares, strict=True):
            first = (m.key(middle) == limit) & (m.places() < m.of_each(middle))
            found.append(m.count(first) >= share)
        return found

    # No turn where no number is equal to another, or all of them are taken.
    ends = [
        z + math.prod(m.array.shape[d] for d in m.dims) for m, z in zip(every, zeros, strict=True)
    ]
    starts = [jnp.where(t == s, e, z) for t, s, e, z in zip(tied, shares, ends, zeros, strict=True)]
    ends = _halved(enough, starts, ends)
    masks = []
    for m, end, limit in zip(every, ends, limits, strict=True):
        key = m.key(end)
        masks.append((key < limit) | ((key == limit) & (m.places() < m.of_each(end))))
    return masks


def _halved(
    enough: Callable[[list[Array]], list[Array]], low: list[Array], high: list[Array]
) -> list[Array]:
    """The least integers of [low, high] that are enough, where all above one that is are, too."""
    Ends = tuple[list[Array], list[Array]]

    def turn(ends: Ends) -> Ends:
        low, high = ends
        middle = [a + (b - a) // 2 for a, b in zip(low, high, strict=True)]
        here = enough(middle)
        low = [jnp.where(h, a, m + 1) for h, a, m in zip(here, low, middle, strict=True)]
        return low, [jnp.where(h, m, b) for h, b, m in zip(here, high, middle, strict=True)]

    def open_still(ends: Ends) -> Array:
        found = [jnp.any(a < b) for a, b in zip(*ends, strict=True)]
        return jnp.any(jnp.stack(found))

    return jax.lax.while_loop(open_still, turn, (low, high))[1]


def _divided(array: Array, spec: P) -> Array:
    return array if jax.typeof(array).sharding.mesh.empty else jax.reshard(array, spec)
