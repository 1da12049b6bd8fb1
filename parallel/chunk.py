"""The layers of one chunk, in loops: forward, and the parts of the backward pass.

The unit of a loop is one period of layers, see `parallel.split`. What a unit keeps is written to
its place in a ring buffer [slots, units, ...] and read from there, without a copy for the chunk.
A chunk with fewer units than the largest runs only those: the loops' bounds are then values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from parallel.split import Split

Arrays = list[jax.Array]
Row = dict[str, Any]  # what a table says of an action: scalars


@dataclass(frozen=True)
class Chunks:
    """The chunks of a stage, of which `row` names one.

    Attributes:
      split: a unit's computation.
      weights: its arrays that are differentiated: of layers, [chunks * units * period, ...] each,
        and those that all layers read.
      copies: the same of those that are not, or none.
      stacked: which of either list are of layers.
      units: rows of a chunk; the last ones may be padding.
      period: layers of a unit.
      even: no chunk is padded.
    """

    split: Split
    weights: Arrays
    copies: Arrays
    stacked: list[bool]
    units: int
    period: int
    even: bool

    def ring(self, slots: int, shapes: Sequence[Any]) -> Arrays:
        """Empty buffers for what units keep."""
        return [
            jnp.zeros(
                (slots, self.units, *like.shape),
                like.dtype,
                out_sharding=P(None, None, *like.sharding.spec),
            )
            for like in shapes
        ]

    def kept(self, slots: int) -> Arrays:
        """A ring for what the forward pass leaves."""
        return self.ring(slots, self.split.kept)

    def pending(self, slots: int) -> Arrays:
        """A ring for what `input_grad` leaves."""
        return self.ring(slots, self.split.pending)

    def forward(
        self, row: Row, x_BTD: jax.Array, ring: Arrays, slot: jax.Array
    ) -> tuple[jax.Array, Arrays]:
        """(y_BTD, ring); an empty list keeps nothing."""
        shared = self.split.at(row["microbatch"])

        def unit(i: jax.Array, carry: tuple[jax.Array, Arrays]) -> tuple[jax.Array, Arrays]:
            x_BTD, ring = carry
            y_BTD, kept = self.split.forward(shared, self._at(row, i), self._number(row, i), x_BTD)
            return y_BTD, _put(ring, kept, slot, i) if ring else ring

        return self._loop(row, unit, (x_BTD, ring))

    def backward(
        self, row: Row, dy_BTD: jax.Array, ring: Arrays, slot: jax.Array, sums: Arrays
    ) -> tuple[jax.Array, Arrays]:
        """(dx_BTD, sums), to which the gradients of the weights are added."""
        shared = self.split.at(row["microbatch"])

        def unit(i: jax.Array, carry: tuple[jax.Array, Arrays]) -> tuple[jax.Array, Arrays]:
            dy_BTD, sums = carry
            dx_BTD, gradients = self.split.backward(
                shared, self._at(row, i), self._number(row, i), _take(ring, slot, i), dy_BTD
            )
            return dx_BTD, self._added(row, i, sums, gradients)

        return self._loop(row, unit, (dy_BTD, sums), reverse=True)

    def input_grad(
        self,
        row: Row,
        dy_BTD: jax.Array,
        ring: Arrays,
        slot: jax.Array,
        pending: Arrays,
        pending_slot: jax.Array,
    ) -> tuple[jax.Array, Arrays]:
        """(dx_BTD, pending); an empty list keeps nothing for `weight_grad`."""
        shared = self.split.at(row["microbatch"])

        def unit(i: jax.Array, carry: tuple[jax.Array, Arrays]) -> tuple[jax.Array, Arrays]:
            dy_BTD, pending = carry
            dx_BTD, left = self.split.input_grad(
                shared, self._at(row, i), self._number(row, i), _take(ring, slot, i), dy_BTD
            )
            return dx_BTD, _put(pending, left, pending_slot, i) if pending else pending

        return self._loop(row, unit, (dy_BTD, pending), reverse=True)

    def weight_grad(
        self,
        row: Row,
        ring: Arrays,
        slot: jax.Array,
        pending: Arrays,
        pending_slot: jax.Array,
        sums: Arrays,
    ) -> Arrays:
        """The sums with the gradients of the weights, from what `input_grad` left."""
        shared = self.split.at(row["microbatch"])

        def unit(i: jax.Array, sums: Arrays) -> Arrays:
            gradients = self.split.weight_grad(
                shared,
                self._at(row, i),
                self._number(row, i),
                _take(ring, slot, i),
                _take(pending, pending_slot, i),
            )
            return self._added(row, i, sums, gradients)

        return self._loop(row, unit, sums)

    def _loop(self, row: Row, unit: Callable[..., Any], carry: Any, reverse: bool = False) -> Any:
        count = self.units if self.even else row["layers"] // self.period
        if reverse:
            return lax.fori_loop(0, count, lambda i, carry: unit(count - 1 - i, carry), carry)
        return lax.fori_loop(0, count, unit, carry)

    def _place(self, row: Row, i: jax.Array) -> jax.Array:
        """The first row of a unit in the stage's arrays."""
        return (row["chunk"] * self.units + i) * self.period

    def _number(self, row: Row, i: jax.Array) -> jax.Array:
        """The number of a unit's first layer in the model."""
        return row["first"] + i * self.period

    def _at(self, row: Row, i: jax.Array) -> Arrays:
        """The weights of a unit."""
        return self._layers(self.weights, row, i) + self._layers(self.copies, row, i)

    def _layers(self, arrays: Arrays, row: Row, i: jax.Array) -> Arrays:
        place = self._place(row, i)
        return [
            lax.dynamic_slice_in_dim(a, place, self.period) if own else a
            for a, own in zip(arrays, self.stacked, strict=False)  # of empty copies none
        ]

    def _added(self, row: Row, i: jax.Array, sums: Arrays, gradients: Arrays) -> Arrays:
        place = self._place(row, i)
        new = [
            a + g.astype(a.dtype)
            for a, g in zip(self._layers(sums, row, i), gradients, strict=True)
        ]
        return [
            lax.dynamic_update_slice_in_dim(a, part, place, 0) if own else part
            for a, part, own in zip(sums, new, self.stacked, strict=True)
        ]


def _take(ring: Arrays, slot: jax.Array, i: jax.Array) -> Arrays:
    def one(array: jax.Array) -> jax.Array:
        zeros = (0,) * (array.ndim - 2)
        part = lax.dynamic_slice(array, (slot, i, *zeros), (1, 1, *array.shape[2:]))
        return lax.squeeze(part, (0, 1))

    return [one(array) for array in ring]


def _put(ring: Arrays, values: Arrays, slot: jax.Array, i: jax.Array) -> Arrays:
    def one(array: jax.Array, value: jax.Array) -> jax.Array:
        zeros = (0,) * (array.ndim - 2)
        part = lax.expand_dims(value, (0, 1))
        return lax.dynamic_update_slice(array, part, (slot, i, *zeros))

    return [one(array, value) for array, value in zip(ring, values, strict=True)]
