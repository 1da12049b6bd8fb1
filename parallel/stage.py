"""One stage of a pipeline: its buffers and sums, and the actions that a table's row asks for.

What is here is traced once for all stages, inside `parallel.pipeline`'s Manual region; which action
runs is decided on the device, by the stage's own column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from parallel.chunk import Chunks
from parallel.division import Division
from parallel.mesh import PIPE
from parallel.schedule_program import Program
from parallel.split import Split
from parallel.when import when
from parallel.zero import Tree, together

Sums = tuple[jax.Array, dict[str, jax.Array]]
Carry = dict[str, Any]
Row = dict[str, Any]  # of the columns of one kind of action: scalars


@dataclass(frozen=True)
class Cut:
    """A model that can be cut between layers: pure functions on the tree of its parameters.

    Each gets the whole tree, in which the stacked arrays may be those of a few layers. The key is
    that of the micro-batch, or None.

    Attributes:
      embed: (params, batch, key) -> x_BTD; reads nothing stacked.
      blocks: (params, x_BTD, batch, key, number of the first layer) -> x_BTD; reads nothing else.
      loss: (params, x_BTD, batch, weights_BT) -> (float32 sum, float32 sums); reads nothing
        stacked.
      layers: how many there are.
      period: of the pattern of layer kinds; a chunk has whole ones.
    """

    embed: Callable[..., jax.Array]
    blocks: Callable[..., jax.Array]
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    layers: int
    period: int = 1


class Arrays(NamedTuple):
    """What a stage is given; lists of arrays as `Parts.divide` makes them.

    Attributes:
      own, outside: what is differentiated: the stacked arrays of this stage's layers, and the rest.
      own_copy, outside_copy: the whole copies at ZeRO level 2, else empty.
      batch, weights: arrays [micro-batches, B, T].
      key: of the step, or None.
    """

    own: list[jax.Array]
    outside: list[jax.Array]
    own_copy: list[jax.Array]
    outside_copy: list[jax.Array]
    batch: Tree
    weights: jax.Array
    key: jax.Array | None


@dataclass(frozen=True)
class Parts:
    """A tree of parameters as two lists: what is stacked, and what is not."""

    tree: Any
    stacked: list[bool]

    def divide(self, tree: Tree | None) -> tuple[list[Any], list[Any]]:
        """The lists of a tree like that of the parameters; of None, empty ones."""
        if tree is None:
            return [], []
        arrays = list(zip(self.tree.flatten_up_to(tree), self.stacked, strict=True))
        return [a for a, own in arrays if own], [a for a, own in arrays if not own]

    def join(self, own: list[Any], outside: list[Any]) -> Tree:
        """The tree of two lists."""
        lists = iter(own), iter(outside)
        return self.tree.unflatten([next(lists[0 if own else 1]) for own in self.stacked])


class Stage:
    """The actions of a stage, and the scan over its ticks."""

    def __init__(
        self,
        cut: Cut,
        program: Program,
        division: Division,
        parts: Parts,
        arrays: Arrays,
        accumulate: str,
    ) -> None:
        self.cut, self.program, self.parts, self.arrays = cut, program, parts, arrays
        self.accumulate = accumulate
        self.schedule = program.schedule
        self.last = self.schedule.positions - 1
        row = dict.fromkeys(("microbatch", "position"), jnp.int32(0))
        self.x_BTD = jax.eval_shape(self.embed, arrays.outside, row)
        period, most = cut.period, division.most
        first = [[a[:period] for a in own] for own in (arrays.own, arrays.own_copy)]
        self.chunks = Chunks(
            Split(self.unit, first[0], first[1], self.x_BTD),
            [*arrays.own, *arrays.own_copy],
            len(arrays.own),
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

    # --- The parts of the model, as functions of what is differentiated ----------------------

    def microbatch(self, index: jax.Array) -> tuple[Tree, jax.Array, jax.Array | None]:
        """Batch, weights and key of a micro-batch."""
        key = self.arrays.key
        batch, weights = jax.tree.map(
            lambda a: _take(a, index), (self.arrays.batch, self.arrays.weights)
        )
        if key is not None and self.schedule.microbatches > 1:
            key = jax.random.fold_in(key, index)
        return batch, weights, key

    def params(self, own: list[jax.Array], outside: list[jax.Array], copy: list[jax.Array]) -> Tree:
        """What the model takes; `copy` is that of `own`."""
        whole = self.parts.join(copy, self.arrays.outside_copy) if copy else None
        return together(self.parts.join(own, outside), whole)

    def outer(self, outside: list[jax.Array]) -> Tree:
        """The same for what reads nothing stacked."""
        return self.params(self.arrays.own, outside, self.arrays.own_copy)

    def embed(self, outside: list[jax.Array], row: Row) -> jax.Array:
        batch, _, key = self.microbatch(row["microbatch"])
        return self.cut.embed(self.outer(outside), batch, key)

    def unit(
        self,
        own: list[jax.Array],
        copy: list[jax.Array],
        x_BTD: jax.Array,
        number: jax.Array,
        index: jax.Array,
    ) -> jax.Array:
        batch, _, key = self.microbatch(index)
        return self.cut.blocks(
            self.params(own, self.arrays.outside, copy), x_BTD, batch, key, number
        )

    def loss(self, outside: list[jax.Array], x_BTD: jax.Array, row: Row) -> Sums:
        batch, weights_BT, _ = self.microbatch(row["microbatch"])
        return self.cut.loss(self.outer(outside), x_BTD, batch, weights_BT)

    # --- The carry ---------------------------------------------------------------------------

    def start(self) -> Carry:
        """Empty buffers, and sums of zero."""
        row = dict.fromkeys(("microbatch", "position"), jnp.int32(0))
        x_BTD = self.x_BTD
        sums = jax.eval_shape(self.loss, self.arrays.outside, x_BTD, row)
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
            "own": [zeros(a) for a in self.arrays.own],
            "outside": [zeros(a) for a in self.arrays.outside],
            "sent": [self.nothing() for _ in self.program.transfers],
            "sums": jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums),
        }

    def nothing(self) -> jax.Array:
        """What is sent by a stage that has nothing to send."""
        x_BTD = self.x_BTD
        return jnp.zeros(x_BTD.shape, x_BTD.dtype, out_sharding=x_BTD.sharding.spec)

    def with_loss(self, carry: Carry, y_BTD: jax.Array, row: Row) -> tuple[Carry, jax.Array]:
        """Adds the loss of a micro-batch and its gradient by the head; gives that by `y_BTD`."""
        grad = jax.value_and_grad(self.loss, argnums=(0, 1), has_aux=True)
        sums, (outside, dy_BTD) = grad(self.arrays.outside, y_BTD, row)
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
            lambda: self.embed(self.arrays.outside, row),
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
            dx_BTD, own = self.chunks.backward(row, dy_BTD, ring, row["residual"], carry["own"])
            return carry | {"own": own}, dx_BTD
        dx_BTD, pending = self.chunks.input_grad(
            row, dy_BTD, ring, row["residual"], carry["pending"], row["pending"]
        )
        return carry | {"pending": pending}, dx_BTD

    def weight(self, carry: Carry, row: Row) -> Carry:
        """W, where B has not done it."""
        own = self.chunks.weight_grad(
            row,
            carry["residual"],
            row["residual"],
            carry["pending"],
            row["pending"],
            carry["own"],
        )
        return carry | {"own": own}

    def to_embedding(self, carry: Carry, dx_BTD: jax.Array, row: Row) -> Carry:
        """Adds the gradient of the embedding, on the first chunk."""

        def first(sums: list[jax.Array]) -> list[jax.Array]:
            _, back = jax.vjp(lambda outside: self.embed(outside, row), self.arrays.outside)
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
