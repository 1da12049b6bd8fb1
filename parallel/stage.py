"""One stage of a pipeline: its buffers and sums, and the actions that a table's row asks for.

What is here is traced once for all stages, inside `parallel.pipeline`'s Manual region; which action
runs is decided on the device, by the stage's own column.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from parallel.chunk import Chunks
from parallel.cut import StageModel
from parallel.division import Division
from parallel.mesh import PIPE
from parallel.schedule_program import Program
from parallel.split import Split
from parallel.when import when

Carry = dict[str, Any]
Row = dict[str, Any]  # of the columns of one kind of action: scalars


class Stage:
    """The actions of a stage, and the scan over its ticks."""

    def __init__(
        self, model: StageModel, program: Program, division: Division, accumulate: str
    ) -> None:
        self.model, self.program, self.accumulate = model, program, accumulate
        self.last = program.schedule.positions - 1
        arrays = model.arrays
        self.x_BTD = jax.eval_shape(model.embed, arrays.outside, jnp.int32(0))
        period, most = model.cut.period, division.most
        weights, copies = (
            model.parts.read_by_layers(own, outside)
            for own, outside in (
                (arrays.own, arrays.outside),
                (arrays.own_copy, arrays.outside_copy),
            )
        )
        stacked = model.parts.stacked_of_read

        def unit(arrays: list[jax.Array]) -> list[jax.Array]:
            pairs = zip(arrays, stacked, strict=False)  # of empty copies none
            return [a[:period] if own else a for a, own in pairs]

        self.chunks = Chunks(
            Split(model.unit, unit(weights), unit(copies), self.x_BTD),
            weights,
            copies,
            stacked,
            most // period,
            period,
            division.even,
        )

    def run(self, table: Any) -> tuple[Carry, jax.Array]:
        """The carry after all ticks, and int32[ticks, 3]: which of F, B and W ran.

        `table` holds this stage's columns.
        """
        # The columns say when it is sent; it is written in the next tick.
        late = lambda slot: jnp.concatenate([jnp.full_like(slot[:1], -1), slot[:-1]])
        table = table | {"transfers": [late(slot) for slot in table["transfers"]]}
        return lax.scan(self.tick, self.start(), table)

    # --- The carry ---------------------------------------------------------------------------

    def start(self) -> Carry:
        """Empty buffers, and sums of zero."""
        x_BTD, arrays = self.x_BTD, self.model.arrays
        sums = jax.eval_shape(self.model.loss, arrays.outside, x_BTD, jnp.int32(0))
        capacity = self.program.slots.capacity

        def ring(buffer: str) -> jax.Array:
            shape = capacity(buffer), *x_BTD.shape
            return jnp.zeros(shape, x_BTD.dtype, out_sharding=P(None, *x_BTD.sharding.spec))

        def zeros(array: jax.Array) -> jax.Array:
            spec = jax.typeof(array).sharding.spec
            return jnp.zeros(array.shape, self.accumulate, out_sharding=spec)

        return {
            "input": ring("input"),
            "residual": self.chunks.kept(capacity("residual")),
            "cotangent": ring("cotangent"),
            "pending": self.chunks.pending(capacity("pending")) if capacity("pending") else [],
            "own": [zeros(a) for a in arrays.own],
            "outside": [zeros(a) for a in arrays.outside],
            "sent": [self.nothing() for _ in self.program.transfers],
            "sums": jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums),
        }

    def nothing(self) -> jax.Array:
        """What is sent by a stage that has nothing to send."""
        x_BTD = self.x_BTD
        return jnp.zeros(x_BTD.shape, x_BTD.dtype, out_sharding=x_BTD.sharding.spec)

    def sums(self, carry: Carry) -> list[jax.Array]:
        """The sums of gradients that layers add to."""
        return self.model.parts.read_by_layers(carry["own"], carry["outside"])

    def with_sums(self, carry: Carry, sums: list[jax.Array]) -> Carry:
        """The carry with those."""
        own, outside = self.model.parts.replaced(sums, carry["outside"])
        return carry | {"own": own, "outside": outside}

    def with_loss(self, carry: Carry, y_BTD: jax.Array, row: Row) -> tuple[Carry, jax.Array]:
        """Adds the loss of a micro-batch and its gradient by the head; gives that by `y_BTD`."""
        grad = jax.value_and_grad(self.model.loss, argnums=(0, 1), has_aux=True)
        sums, (outside, dy_BTD) = grad(self.model.arrays.outside, y_BTD, row["microbatch"])
        new = {
            "sums": jax.tree.map(jnp.add, carry["sums"], sums),
            "outside": _added(carry["outside"], outside),
        }
        return carry | new, dy_BTD

    # --- Actions -----------------------------------------------------------------------------

    def forward(self, carry: Carry, row: Row) -> tuple[Carry, jax.Array]:
        """F; gives what is sent on. The last chunk computes its loss."""
        x_BTD = lax.cond(
            row["position"] == 0,
            lambda: self.model.embed(self.model.arrays.outside, row["microbatch"]),
            lambda: _take(carry["input"], row["input"]),
        )
        y_BTD, ring = self.chunks.forward(row, x_BTD, carry["residual"], row["residual"])

        def loss(part: Carry) -> Carry:
            part, dy_BTD = self.with_loss(part, y_BTD, row)
            return part | {"cotangent": _put(part["cotangent"], dy_BTD, row["cotangent"])}

        part = {name: carry[name] for name in ("sums", "outside", "cotangent")}
        part = when(row["position"] == self.last, loss, part)
        return carry | part | {"residual": ring}, y_BTD

    def backward(self, carry: Carry, row: Row, with_weights: bool) -> tuple[Carry, jax.Array]:
        """B, and W with it or not."""
        dy_BTD, ring = _take(carry["cotangent"], row["cotangent"]), carry["residual"]
        if with_weights:
            sums = self.sums(carry)
            dx_BTD, sums = self.chunks.backward(row, dy_BTD, ring, row["residual"], sums)
            return self.with_sums(carry, sums), dx_BTD
        dx_BTD, pending = self.chunks.input_grad(
            row, dy_BTD, ring, row["residual"], carry["pending"], row["pending"]
        )
        return carry | {"pending": pending}, dx_BTD

    def weight(self, carry: Carry, row: Row) -> Carry:
        """W, where B has not done it."""
        sums = self.chunks.weight_grad(
            row,
            carry["residual"],
            row["residual"],
            carry["pending"],
            row["pending"],
            self.sums(carry),
        )
        return self.with_sums(carry, sums)

    def to_embedding(self, carry: Carry, dx_BTD: jax.Array, row: Row) -> Carry:
        """Adds the gradient of the embedding, on the first chunk."""

        def first(sums: list[jax.Array]) -> list[jax.Array]:
            embed = lambda outside: self.model.embed(outside, row["microbatch"])
            _, back = jax.vjp(embed, self.model.arrays.outside)
            return _added(sums, back(dx_BTD)[0])

        return carry | {"outside": when(row["position"] == 0, first, carry["outside"])}

    # --- Ticks -------------------------------------------------------------------------------

    def run_forward(self, carry: Carry, row: Row) -> tuple[Carry, jax.Array, jax.Array]:
        """F or nothing: the carry, what is sent on, 1 where it ran."""
        idle = carry, self.nothing(), jnp.int32(0)
        return when(
            row["microbatch"] >= 0, lambda state: (*self.forward(state[0], row), jnp.int32(1)), idle
        )

    def run_backward(
        self, carry: Carry, row: Row, fused: jax.Array
    ) -> tuple[Carry, jax.Array, jax.Array, jax.Array]:
        """B, B with W, or nothing: the carry, what is sent back, 1 where B and where W ran."""
        Ran = tuple[Carry, jax.Array, jax.Array, jax.Array]

        def run(state: Ran, with_weights: bool) -> Ran:
            carry, dx_BTD = self.backward(state[0], row, with_weights)
            ran = jnp.int32(1), jnp.int32(with_weights)
            return self.to_embedding(carry, dx_BTD, row), dx_BTD, *ran

        here = row["microbatch"] >= 0
        state = carry, self.nothing(), jnp.int32(0), jnp.int32(0)
        if self.program.fused.any():
            state = when(here & fused, lambda state: run(state, True), state)
        if self.apart:
            state = when(here & ~fused, lambda state: run(state, False), state)
        return state

    @property
    def apart(self) -> bool:
        """Whether there is a W that is not fused with its B."""
        return bool(((self.program.weight.microbatch >= 0) & ~self.program.fused).any())

    def run_weight(self, carry: Carry, row: Row, fused: jax.Array) -> tuple[Carry, jax.Array]:
        """W, if B has not done it, or nothing: the carry, 1 where it ran."""
        return when(
            (row["microbatch"] >= 0) & ~fused,
            lambda state: (self.weight(state[0], row), jnp.int32(1)),
            (carry, jnp.int32(0)),
        )

    def tick(self, carry: Carry, row: Row) -> tuple[Carry, jax.Array]:
        """What was sent in the last tick arrives; F, B and W; what they give is sent.

        Written at the start, after which the rings are only read in turn: a write at the end would
        not be ordered after B's reading by data, and the compiler would copy the ring whole.
        """
        for transfer, slot, value in zip(
            self.program.transfers, row["transfers"], carry["sent"], strict=True
        ):
            buffer = "input" if transfer.kind == "F" else "cotangent"
            place = jnp.maximum(slot, 0)
            kept = jnp.where(slot >= 0, value, _take(carry[buffer], place))
            carry = carry | {buffer: _put(carry[buffer], kept, place)}
        carry, y_BTD, forward = self.run_forward(carry, row["F"])
        carry, dx_BTD, backward, weight = self.run_backward(carry, row["B"], row["fused"])
        if self.apart:
            carry, later = self.run_weight(carry, row["W"], row["fused"])
            weight = weight + later
        sent = []
        for transfer in self.program.transfers:
            value = y_BTD if transfer.kind == "F" else dx_BTD
            if any(source != target for source, target in transfer.pairs):
                value = lax.ppermute(value, PIPE, transfer.pairs)
            sent.append(value)
        return carry | {"sent": sent}, jnp.stack([forward, backward, weight])


def _take(array: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(array, index, 0, keepdims=False)


def _put(array: jax.Array, value: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(array, value, index, 0)


def _added(sums: list[jax.Array], gradients: list[jax.Array]) -> list[jax.Array]:
    return [a + g.astype(a.dtype) for a, g in zip(sums, gradients, strict=True)]
