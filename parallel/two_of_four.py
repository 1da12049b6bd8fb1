"""2:4 sparsity: of every four rows of a channel two are kept, beside their places.

Mishra et al. 2021, https://arxiv.org/abs/2104.08378. Two 16-bit values and two places of 2 bits in
the place of four values: 36 of 64 bits, 0.5625 of bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

from parallel.rules import Rules
from parallel.stored import Matrix, Packed, aligned_names


@partial(jax.tree_util.register_dataclass, data_fields=["values", "places"], meta_fields=["matrix"])
@dataclass(frozen=True)
class TwoOfFour(Packed):
    """A weight [lead, K, M] whose every four rows hold two numbers.

    Attributes:
      values: [lead, K / 2, M].
      places: uint8 [lead, K / 8, M], of eight rows 2 bits for each kept one.
    """

    values: Any
    places: Any
    matrix: Matrix

    def cast(self, dtype: Any) -> TwoOfFour:
        """The values in another dtype."""
        return replace(self, values=self.values.astype(dtype))

    def main(self) -> jax.Array:
        """The values."""
        return self.values

    def unpacked(self, dtype: Any) -> jax.Array:
        """See `Packed`."""
        *lead, half, columns = self.values.shape
        # The places of the four that are kept in eight rows, two of each four.
        places = jnp.stack([(self.places >> 2 * i) & 3 for i in range(4)], axis=-2)
        places = places.reshape(*lead, half // 2, 2, columns)
        values = self.values.astype(dtype).reshape(*lead, half // 2, 2, columns)
        zero = jnp.zeros_like(values)
        rows = [jnp.sum(jnp.where(places == i, values, zero), axis=-2) for i in range(4)]
        return jnp.stack(rows, axis=-2).reshape(*lead, 2 * half, columns)


def two_of_four(matrix: Matrix, w: jax.Array, dtype: Any) -> TwoOfFour:
    """A matrix [..., K, M] of which the two largest of every four rows are kept, in `dtype`."""
    *lead, rows, columns = w.shape
    fours = w.reshape(*lead, rows // 4, 4, columns)
    # The places of the two largest, the first of equal ones, in rising order.
    order = jnp.argsort(-jnp.abs(fours), axis=-2, stable=True)[..., :2, :]
    place = jnp.sort(order, axis=-2)
    values = jnp.take_along_axis(fours, place, axis=-2).reshape(*lead, rows // 2, columns)
    eights = place.astype(jnp.uint8).reshape(*lead, rows // 8, 4, columns)
    packed = [eights[..., i, :] << 2 * i for i in range(4)]
    return TwoOfFour(values.astype(dtype), reduce(jnp.bitwise_or, packed), matrix)


def two_of_four_axes(matrix: Matrix, stack: str, rules: Rules) -> TwoOfFour:
    """The logical axes of both arrays."""
    rows, columns = aligned_names(matrix, rules, matrix.rows // 8)
    names = f"{stack}{matrix.lead_names}{rows} -> {columns}"
    return TwoOfFour(names, names, matrix)
