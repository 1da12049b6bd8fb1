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

from parallel.mesh import PIPE
from parallel.residuals import Residuals
from parallel.schedule_program import Program
from parallel.schedule_slots import Kept
from parallel.zero import Tree, together

# With inputs alone, the last chunk's output is not known before B, and so neither is its loss.
INPUTS = Kept(inputs=True, loss="B")

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
      inputs: of what F computes only a chunk's input is kept, and the backward pass computes the
        chunk again; otherwise what the chunk's own rematerialisation keeps.
    """

    embed: Callable[..., jax.Array]
    blocks: Callable[..., jax.Array]
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    layers: int
    period: int = 1
    inputs: bool = False


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
        self, cut: Cut, program: Program, parts: Parts, arrays: Arrays, accumulate: str
    ) -> None:
        self.cut, self.program, self.parts, self.arrays = cut, program, parts, arrays
        self.accumulate = accumulate
        self.schedule = program.schedule
        self.last = self.schedule.positions - 1
        self.layers = cut.layers // self.schedule.positions  # of a chunk

    def run(self, table: Any) -> tuple[Carry, jax.Array]:
        """The carry after all ticks, and which actions ran; `table` holds this stage's columns."""
        ran = jnp.stack([table[kind]["microbatch"] >= 0 for kind in "FBW"], -1)
        return lax.scan(self.tick, self.start(), table)[0], ran.astype(jnp.int32)

    # --- The parts of the model, as functions of what is differentiated ----------------------

    def chunk(self, arrays: list[jax.Array], row: Row) -> list[jax.Array]:
        """The layers of the chunk that an action is of."""
        if self.schedule.chunks == 1:
            return arrays
        first = row["chunk"] * self.layers
        return [lax.dynamic_slice_in_dim(a, first, self.layers) for a in arrays]

    def microbatch(self, row: Row) -> tuple[Tree, jax.Array, jax.Array | None]:
        """Batch, weights and key of the micro-batch that an action is of."""
        index, key = row["microbatch"], self.arrays.key
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
        batch, _, key = self.microbatch(row)
        return self.cut.embed(self.outer(outside), batch, key)

    def blocks(
        self, own: list[jax.Array], copy: list[jax.Array], x_BTD: jax.Array, row: Row
    ) -> jax.Array:
        batch, _, key = self.microbatch(row)
        params = self.params(own, self.arrays.outside, copy)
        return self.cut.blocks(params, x_BTD, batch, key, row["position"] * self.layers)

    def loss(self, outside: list[jax.Array], x_BTD: jax.Array, row: Row) -> Sums:
        batch, weights_BT, _ = self.microbatch(row)
        return self.cut.loss(self.outer(outside), x_BTD, batch, weights_BT)

    # --- The carry ---------------------------------------------------------------------------

    def start(self) -> Carry:
        """Empty buffers, and sums of zero."""
        row = dict.fromkeys(("microbatch", "chunk", "position"), jnp.int32(0))
        self.x_BTD = x_BTD = jax.eval_shape(self.embed, self.arrays.outside, row)
        sums = jax.eval_shape(self.loss, self.arrays.outside, x_BTD, row)
        slots = self.program.slots

        def ring(buffer: str, like: Any) -> jax.Array:
            shape = slots.capacity(buffer), *like.shape
            return jnp.zeros(shape, like.dtype, out_sharding=P(None, *like.sharding.spec))

        def zeros(array: jax.Array) -> jax.Array:
            spec = jax.typeof(array).sharding.spec
            return jnp.zeros(array.shape, self.accumulate, out_sharding=spec)

        kept = []
        if not self.cut.inputs:
            own, copy = self.chunk(self.arrays.own, row), self.chunk(self.arrays.own_copy, row)
            self.residuals = Residuals(
                lambda own, copy, x_BTD: self.blocks(own, copy, x_BTD, row), own, copy, x_BTD
            )
            kept = [ring("residual", like) for like in self.residuals.shapes]
        return {
            "input": ring("input", x_BTD),
            "residual": kept,
            "cotangent": ring("cotangent", x_BTD),
            "own": [zeros(a) for a in self.arrays.own],
            "outside": [zeros(a) for a in self.arrays.outside],
            "sums": jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums),
        }

    def nothing(self) -> jax.Array:
        """What is sent by a stage that has nothing to send."""
        x_BTD = self.x_BTD
        return jnp.zeros(x_BTD.shape, x_BTD.dtype, out_sharding=x_BTD.sharding.spec)

    def with_own(self, carry: Carry, gradients: list[jax.Array], row: Row) -> Carry:
        """Adds the gradients of one chunk's layers."""
        sums = carry["own"]
        new = _added(self.chunk(sums, row), gradients)
        if self.schedule.chunks > 1:
            first = row["chunk"] * self.layers
            new = [
                lax.dynamic_update_slice_in_dim(a, part, first, 0)
                for a, part in zip(sums, new, strict=True)
            ]
        return carry | {"own": new}

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
        """F; gives what is sent on."""
        run = self.forward_inputs if self.cut.inputs else self.forward_residuals
        return lax.cond(
            row["microbatch"] >= 0, run, lambda carry, row: (carry, self.nothing()), carry, row
        )

    def forward_inputs(self, carry: Carry, row: Row) -> tuple[Carry, jax.Array]:
        """Keeps the first chunk's input; the others' came to where it stays."""
        ring = lax.cond(
            row["position"] == 0,
            lambda ring: _put(ring, self.embed(self.arrays.outside, row), row["input"]),
            lambda ring: ring,
            carry["input"],
        )
        own, copy = self.chunk(self.arrays.own, row), self.chunk(self.arrays.own_copy, row)
        # The last chunk computes its loss where it computes the gradient, from its input.
        y_BTD = lax.cond(
            row["position"] == self.last,
            self.nothing,
            lambda: self.blocks(own, copy, _take(ring, row["input"]), row),
        )
        return carry | {"input": ring}, y_BTD

    def forward_residuals(self, carry: Carry, row: Row) -> tuple[Carry, jax.Array]:
        """Keeps what the backward pass reads; the last chunk computes its loss."""
        x_BTD = lax.cond(
            row["position"] == 0,
            lambda: self.embed(self.arrays.outside, row),
            lambda: _take(carry["input"], row["input"]),
        )
        own, copy = self.chunk(self.arrays.own, row), self.chunk(self.arrays.own_copy, row)
        y_BTD, kept = self.residuals.forward(
            lambda own, copy, x_BTD: self.blocks(own, copy, x_BTD, row), own, copy, x_BTD
        )
        rings = [
            _put(ring, array, row["residual"])
            for ring, array in zip(carry["residual"], kept, strict=True)
        ]

        def loss(carry: Carry) -> Carry:
            carry, dy_BTD = self.with_loss(carry, y_BTD, row)
            return carry | {"cotangent": _put(carry["cotangent"], dy_BTD, row["cotangent"])}

        carry = carry | {"residual": rings}
        return lax.cond(row["position"] == self.last, loss, lambda c: c, carry), y_BTD

    def backward(self, carry: Carry, row: Row, fused: jax.Array) -> tuple[Carry, jax.Array]:
        """B, and where `fused` W with it; gives what is sent back."""

        def run(carry: Carry, with_weights: bool) -> tuple[Carry, jax.Array]:
            if self.cut.inputs:
                carry, gradients = self.again(carry, row, with_weights)
            else:
                gradients = self.from_residuals(carry, row)
            own, dx_BTD = gradients
            if with_weights:
                carry = self.with_own(carry, own, row)

            def to_embedding(sums: list[jax.Array]) -> list[jax.Array]:
                _, back = jax.vjp(lambda outside: self.embed(outside, row), self.arrays.outside)
                return _added(sums, back(dx_BTD)[0])

            outside = lax.cond(row["position"] == 0, to_embedding, lambda s: s, carry["outside"])
            return carry | {"outside": outside}, dx_BTD

        kinds: list[Callable[[Carry], tuple[Carry, jax.Array]]]
        kinds = [lambda carry: (carry, self.nothing())]
        if self.program.fused.any():
            kinds.append(lambda carry: run(carry, True))
        if ((self.program.backward.microbatch >= 0) & ~self.program.fused).any():
            kinds.append(lambda carry: run(carry, False))
        kind = jnp.where(row["microbatch"] < 0, 0, jnp.where(fused, 1, len(kinds) - 1))
        return lax.switch(kind, kinds, carry)

    def again(
        self, carry: Carry, row: Row, with_weights: bool
    ) -> tuple[Carry, tuple[list[jax.Array], jax.Array]]:
        """The gradients from the chunk's input, and in the last chunk those of the loss."""
        own, copy = self.chunk(self.arrays.own, row), self.chunk(self.arrays.own_copy, row)
        x_BTD = _take(carry["input"], row["input"])
        if with_weights:
            y_BTD, back = jax.vjp(lambda own, x: self.blocks(own, copy, x, row), own, x_BTD)
        else:
            y_BTD, back = jax.vjp(lambda x: self.blocks(own, copy, x, row), x_BTD)

        def loss(carry: Carry) -> tuple[Carry, jax.Array]:
            carry, dy_BTD = self.with_loss(carry, y_BTD, row)
            if not with_weights:  # W reads it in a later tick
                ring = _put(carry["cotangent"], dy_BTD, row["cotangent"])
                carry = carry | {"cotangent": ring}
            return carry, dy_BTD

        def sent(carry: Carry) -> tuple[Carry, jax.Array]:
            return carry, _take(carry["cotangent"], row["cotangent"])

        carry, dy_BTD = lax.cond(row["position"] == self.last, loss, sent, carry)
        gradients = back(dy_BTD)
        return carry, (gradients[0] if with_weights else [], gradients[-1])

    def from_residuals(self, carry: Carry, row: Row) -> tuple[list[jax.Array], jax.Array]:
        """The gradients from what F kept; the compiler drops those that are not read."""
        own, copy = self.chunk(self.arrays.own, row), self.chunk(self.arrays.own_copy, row)
        kept = [_take(ring, row["residual"]) for ring in carry["residual"]]
        dy_BTD = _take(carry["cotangent"], row["cotangent"])
        return self.residuals.backward(kept, own, copy, dy_BTD)

    def weight(self, carry: Carry, row: Row, fused: jax.Array) -> Carry:
        """W, where B has not done it."""

        def run(carry: Carry) -> Carry:
            if not self.cut.inputs:
                return self.with_own(carry, self.from_residuals(carry, row)[0], row)
            own, copy = self.chunk(self.arrays.own, row), self.chunk(self.arrays.own_copy, row)
            x_BTD = _take(carry["input"], row["input"])
            _, back = jax.vjp(lambda own: self.blocks(own, copy, x_BTD, row), own)
            dy_BTD = _take(carry["cotangent"], row["cotangent"])
            return self.with_own(carry, back(dy_BTD)[0], row)

        return lax.cond((row["microbatch"] >= 0) & ~fused, run, lambda carry: carry, carry)

    def tick(self, carry: Carry, row: Row) -> tuple[Carry, None]:
        """F, B and W, then what is sent arrives."""
        carry, y_BTD = self.forward(carry, row["F"])
        carry, dx_BTD = self.backward(carry, row["B"], row["fused"])
        if not self.schedule.fused:
            carry = self.weight(carry, row["W"], row["fused"])
        for transfer, slot in zip(self.program.transfers, row["transfers"], strict=True):
            buffer, value = ("input", y_BTD) if transfer.kind == "F" else ("cotangent", dx_BTD)
            if any(source != target for source, target in transfer.pairs):
                value = lax.ppermute(value, PIPE, transfer.pairs)
            place = jnp.maximum(slot, 0)
            kept = jnp.where(slot >= 0, value, _take(carry[buffer], place))
            carry = carry | {buffer: _put(carry[buffer], kept, place)}
        return carry, None


def _take(array: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(array, index, 0, keepdims=False)


def _put(array: jax.Array, value: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(array, value, index, 0)


def _added(sums: list[jax.Array], gradients: list[jax.Array]) -> list[jax.Array]:
    return [a + g.astype(a.dtype) for a, g in zip(sums, gradients, strict=True)]
