"""The executor of pipeline schedules: one program for any table, in one SPMD computation.

Only the pipe axis is Manual, so each stage runs the column of the table that is its own, and what a
stage computes stays Explicit over the other axes. The members of a collective over those are of one
stage and take the same branch; between stages there is nothing but one `ppermute` for each transfer
of a tick. A tick's actions stand behind a `cond` each: an idle stage computes nothing.

Everything that outlives a tick is in the carry of one scan: ring buffers with as many slots as the
table needs, and one sum of gradients. The scan is never differentiated; gradients are taken inside
the actions, so that memory grows with the slots and not with the micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from parallel.mesh import PIPE
from parallel.rules import Rules
from parallel.schedule import Schedule
from parallel.schedule_kinds import make_schedule
from parallel.schedule_program import Columns, Program, make_program
from parallel.schedule_slots import Kept
from parallel.zero import Tree, together

INPUTS = Kept(inputs=True, loss="B")  # what this executor keeps


@dataclass(frozen=True)
class PipelineConfig:
    """How stages work together (`config.pipeline`); of no effect where `config.mesh.pipe` is 1.

    Attributes:
      schedule: `gpipe`, `1f1b`, `interleaved`, `zb_h1` or `zb_v`.
      microbatches: parts of a step's batch; they are its gradient accumulation, too.
      chunks: of a stage's layers; 0 for what the schedule usually has.
      form: of the schedule, `wide`, `lean` or `single`; empty for its first.
    """

    schedule: str = "1f1b"
    microbatches: int = 8
    chunks: int = 0
    form: str = ""

    def __post_init__(self) -> None:
        if self.microbatches < 1:
            raise ValueError(f"config.pipeline.microbatches = {self.microbatches}: at least 1")
        if self.chunks < 0:
            raise ValueError(f"config.pipeline.chunks = {self.chunks}: 1 or more, or 0")

    def table(self, stages: int, microbatches: int | None = None) -> Schedule:
        """The schedule.

        Raises:
          ValueError: see `make_schedule`.
        """
        form: Any = self.form or None
        count = self.microbatches if microbatches is None else microbatches
        return make_schedule(self.schedule, stages, count, self.chunks or None, form)


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


def check_layers(schedule: Schedule, layers: int, period: int = 1) -> None:
    """Refuses a schedule whose chunks would not be equal, or not whole periods of layer kinds.

    Raises:
      ValueError: naming config.model.layers.
    """
    unit = schedule.positions * period
    if layers % unit:
        what = f"config.mesh.pipe = {schedule.stages}"
        if schedule.chunks > 1:
            what += f" x {schedule.chunks} chunks a stage"
        if period > 1:
            what += f" x {period} kinds in config.model.pattern"
        raise ValueError(
            f"config.model.layers = {layers} does not divide by {what}; choose a multiple of {unit}"
        )


Sums = tuple[jax.Array, dict[str, jax.Array]]
Carry = dict[str, Any]


def run_pipeline(
    cut: Cut,
    schedule: Schedule,
    rules: Rules,
    axes: Tree,
    leaves: Tree,
    copy: Tree | None,
    microbatches: tuple[Tree, jax.Array],
    key: jax.Array | None,
    accumulate: str,
) -> tuple[Sums, Tree]:
    """Runs a schedule.

    Args:
      cut: the model.
      schedule: its table.
      rules: the layout; `layers` is divided over the pipe axis.
      axes: the tree of logical axis strings of the parameters.
      leaves, copy: of `parallel.zero.laid_out`; `leaves` are differentiated.
      microbatches: (batch, weights), each array [micro-batches, B, T].
      key: folded with a micro-batch's number if there are several; None stays None.
      accumulate: dtype in which gradients are summed.

    Returns:
      The loss's sums over micro-batches, and the gradients, divided as `rules.of_gradient`.
    """
    program = make_program(schedule, INPUTS)
    names: list[str]
    tree: Any
    names, tree = jax.tree.flatten(axes)
    stacked = [name.split()[0] == "layers" for name in names]
    by_stage = tree.unflatten([P(PIPE) if own else P() for own in stacked])
    stages = _Stages(cut, program, tree, stacked, accumulate)
    run = jax.shard_map(
        stages.run,
        in_specs=(by_stage, None if copy is None else by_stage, P(), P(), P(None, PIPE)),
        out_specs=(P(), by_stage),
        axis_names={PIPE},
        check_vma=False,
    )
    order = _layer_order(schedule, cut.layers)
    if order is not None:
        leaves, copy = (_reordered(part, stacked, order) for part in (leaves, copy))
    sums, grads = run(leaves, copy, microbatches, key, _columns(program))
    if order is not None:
        grads = _reordered(grads, stacked, np.argsort(order))

    def at_rest(array: jax.Array, names: str) -> jax.Array:
        return jax.reshard(array, rules.of_gradient(names, array.shape))

    return sums, jax.tree.map(at_rest, grads, axes)


def _layer_order(schedule: Schedule, layers: int) -> np.ndarray | None:
    """The layers by stage and chunk; None where that is their own order."""
    if schedule.chunks == 1:
        return None
    each = layers // schedule.positions
    return np.concatenate(
        [
            schedule.position(stage, chunk) * each + np.arange(each)
            for stage in range(schedule.stages)
            for chunk in range(schedule.chunks)
        ]
    )


def _reordered(tree: Tree | None, stacked: list[bool], order: np.ndarray) -> Tree | None:
    """Stacked arrays in another order of layers: what moves goes from stage to stage."""
    if tree is None:
        return None
    structure: Any
    arrays, structure = jax.tree.flatten(tree)

    def taken(array: jax.Array) -> jax.Array:
        return array.at[order].get(out_sharding=jax.typeof(array).sharding.spec)

    return structure.unflatten(
        [taken(array) if own else array for array, own in zip(arrays, stacked, strict=True)]
    )


def _columns(program: Program) -> dict[str, Any]:
    """The table as arrays [ticks, stages], for the scan."""
    schedule = program.schedule

    def columns(kind: Columns) -> dict[str, np.ndarray]:
        position = np.full_like(kind.microbatch, -1)
        for tick, stage in np.argwhere(kind.microbatch >= 0):
            position[tick, stage] = schedule.position(int(stage), int(kind.chunk[tick, stage]))
        return asdict(kind) | {"position": position}

    return {
        "F": columns(program.forward),
        "B": columns(program.backward),
        "W": columns(program.weight),
        "fused": program.fused,
        "transfers": [transfer.slot for transfer in program.transfers],
    }


@dataclass(frozen=True)
class _Stages:
    """What is static about a run; `run` is traced once for all stages."""

    cut: Cut
    program: Program
    tree: Any
    stacked: list[bool]
    accumulate: str

    def run(
        self,
        leaves: Tree,
        copy: Tree | None,
        microbatches: tuple[Tree, jax.Array],
        key: jax.Array | None,
        columns: dict[str, Any],
    ) -> tuple[Sums, Tree]:
        own, outside = self.divide(leaves)
        stage = _Stage(self, own, outside, copy, microbatches, key)
        columns = jax.tree.map(lambda a: jnp.squeeze(a, 1), columns)  # this stage's
        carry, _ = lax.scan(stage.tick, stage.start(), columns)
        # Embedding and head are the first and the last stage's, tied or not; others have zeros.
        outside_grads = [lax.psum(g, PIPE) for g in carry["outside"]]
        return lax.psum(carry["sums"], PIPE), self.join(carry["own"], outside_grads)

    def divide(self, tree: Tree) -> tuple[list[Any], list[Any]]:
        """A tree like the parameters' as lists: what is stacked, and what is not."""
        arrays = list(zip(self.tree.flatten_up_to(tree), self.stacked, strict=True))
        return [a for a, own in arrays if own], [a for a, own in arrays if not own]

    def join(self, own: list[Any], outside: list[Any]) -> Tree:
        own, outside = list(own), list(outside)
        return self.tree.unflatten([(own if s else outside).pop(0) for s in self.stacked])


class _Stage:
    """One stage's actions; the arrays are tracers of the run."""

    def __init__(
        self,
        stages: _Stages,
        own: list[jax.Array],
        outside: list[jax.Array],
        copy: Tree | None,
        microbatches: tuple[Tree, jax.Array],
        key: jax.Array | None,
    ) -> None:
        self.stages, self.cut, self.program = stages, stages.cut, stages.program
        self.own, self.outside, self.copy = own, outside, copy
        self.microbatches, self.key = microbatches, key
        self.schedule = self.program.schedule
        self.last = self.schedule.positions - 1
        self.layers = self.cut.layers // self.schedule.positions  # of a chunk

    # --- The parts of the model, as functions of what is differentiated ----------------------

    def params(self, own: list[jax.Array], outside: list[jax.Array], chunk: Any) -> Tree:
        copy = self.copy
        if copy is not None:
            copy_own, copy_outside = self.stages.divide(copy)
            copy = self.stages.join(self.of_chunk(copy_own, chunk), copy_outside)
        return together(self.stages.join(own, outside), copy)

    def of_chunk(self, own: list[jax.Array], chunk: jax.Array) -> list[jax.Array]:
        """The layers of one chunk."""
        if self.schedule.chunks == 1:
            return own
        return [lax.dynamic_slice_in_dim(a, chunk * self.layers, self.layers) for a in own]

    def microbatch(self, row: dict[str, Any]) -> tuple[Tree, jax.Array, jax.Array | None]:
        """Batch, weights and key of a micro-batch."""
        index = row["microbatch"]
        batch, weights = jax.tree.map(lambda a: _take(a, index), self.microbatches)
        several = self.schedule.microbatches > 1
        key = jax.random.fold_in(self.key, index) if self.key is not None and several else self.key
        return batch, weights, key

    def embed(self, outside: list[jax.Array], row: dict[str, Any]) -> jax.Array:
        batch, _, key = self.microbatch(row)
        own = self.of_chunk(self.own, row["chunk"])
        return self.cut.embed(self.params(own, outside, row["chunk"]), batch, key)

    def blocks(self, own: list[jax.Array], x_BTD: jax.Array, row: dict[str, Any]) -> jax.Array:
        batch, _, key = self.microbatch(row)
        params = self.params(own, self.outside, row["chunk"])
        return self.cut.blocks(params, x_BTD, batch, key, row["position"] * self.layers)

    def loss(self, outside: list[jax.Array], x_BTD: jax.Array, row: dict[str, Any]) -> Sums:
        batch, weights_BT, _ = self.microbatch(row)
        own = self.of_chunk(self.own, row["chunk"])
        params = self.params(own, outside, row["chunk"])
        return self.cut.loss(params, x_BTD, batch, weights_BT)

    # --- The carry ---------------------------------------------------------------------------

    def start(self) -> Carry:
        """Empty buffers and sums of zero."""
        row = dict.fromkeys(("microbatch", "chunk", "position"), jnp.int32(0))
        x_BTD = jax.eval_shape(self.embed, self.outside, row)
        sums = jax.eval_shape(self.loss, self.outside, x_BTD, row)
        self.x_BTD = x_BTD
        slots = self.program.slots

        def ring(buffer: str) -> jax.Array:
            shape = slots.capacity(buffer), *x_BTD.shape
            return jnp.zeros(shape, x_BTD.dtype, out_sharding=P(None, *x_BTD.sharding.spec))

        def buffer(array: jax.Array) -> jax.Array:
            spec = jax.typeof(array).sharding.spec
            return jnp.zeros(array.shape, self.stages.accumulate, out_sharding=spec)

        return {
            "input": ring("input"),
            "cotangent": ring("cotangent"),
            "own": [buffer(a) for a in self.own],
            "outside": [buffer(a) for a in self.outside],
            "sums": jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums),
        }

    def nothing(self) -> jax.Array:
        """What is sent by a stage that has nothing to send."""
        x_BTD = self.x_BTD
        return jnp.zeros(x_BTD.shape, x_BTD.dtype, out_sharding=x_BTD.sharding.spec)

    # --- Actions -----------------------------------------------------------------------------

    def forward(self, carry: Carry, row: dict[str, Any]) -> tuple[Carry, jax.Array]:
        """Gives what is sent on."""

        def run(ring: jax.Array) -> tuple[jax.Array, jax.Array]:
            ring = lax.cond(
                row["position"] == 0,
                lambda ring: _put(ring, self.embed(self.outside, row), row["input"]),
                lambda ring: ring,
                ring,
            )
            own = self.of_chunk(self.own, row["chunk"])
            # The last chunk computes its loss where it computes the gradient, from its input.
            y_BTD = lax.cond(
                row["position"] == self.last,
                self.nothing,
                lambda: self.blocks(own, _take(ring, row["input"]), row),
            )
            return ring, y_BTD

        ring, y_BTD = lax.cond(
            row["microbatch"] >= 0, run, lambda ring: (ring, self.nothing()), carry["input"]
        )
        return carry | {"input": ring}, y_BTD

    def backward(
        self, carry: Carry, row: dict[str, Any], fused: jax.Array
    ) -> tuple[Carry, jax.Array]:
        """Gives the gradient that is sent back; with `fused`, sums that of the weights too."""
        names = ("own", "outside", "sums", "cotangent")

        def run(part: Carry, with_weights: bool) -> tuple[Carry, jax.Array]:
            own = self.of_chunk(self.own, row["chunk"])
            x_BTD = _take(carry["input"], row["input"])
            if with_weights:
                y_BTD, back = jax.vjp(lambda own, x: self.blocks(own, x, row), own, x_BTD)
            else:
                y_BTD, back = jax.vjp(lambda x: self.blocks(own, x, row), x_BTD)

            def from_loss(part: Carry) -> tuple[Carry, jax.Array]:
                grad = jax.value_and_grad(self.loss, argnums=(0, 1), has_aux=True)
                sums, (outside, dy_BTD) = grad(self.outside, y_BTD, row)
                part = part | {
                    "sums": jax.tree.map(jnp.add, part["sums"], sums),
                    "outside": _added(part["outside"], outside),
                }
                if not with_weights:
                    part["cotangent"] = _put(part["cotangent"], dy_BTD, row["cotangent"])
                return part, dy_BTD

            def sent(part: Carry) -> tuple[Carry, jax.Array]:
                return part, _take(part["cotangent"], row["cotangent"])

            part, dy_BTD = lax.cond(row["position"] == self.last, from_loss, sent, part)
            gradients = back(dy_BTD)
            dx_BTD = gradients[-1]
            if with_weights:
                part = part | {"own": self.with_chunk(part["own"], gradients[0], row["chunk"])}

            def to_embedding(sums: list[jax.Array]) -> list[jax.Array]:
                _, back = jax.vjp(lambda outside: self.embed(outside, row), self.outside)
                return _added(sums, back(dx_BTD)[0])

            outside = lax.cond(row["position"] == 0, to_embedding, lambda s: s, part["outside"])
            return part | {"outside": outside}, dx_BTD

        kinds = [lambda part: (part, self.nothing())]
        if self.program.fused.any():
            kinds.append(lambda part: run(part, True))
        apart = (self.program.backward.microbatch >= 0) & ~self.program.fused
        if apart.any():
            kinds.append(lambda part: run(part, False))
        kind = jnp.where(row["microbatch"] < 0, 0, jnp.where(fused, 1, len(kinds) - 1))
        part, dx_BTD = lax.switch(kind, kinds, {name: carry[name] for name in names})
        return carry | part, dx_BTD

    def weight(self, carry: Carry, row: dict[str, Any], fused: jax.Array) -> Carry:
        """Sums the gradient of the weights where B did not."""

        def run(sums: list[jax.Array]) -> list[jax.Array]:
            own = self.of_chunk(self.own, row["chunk"])
            x_BTD = _take(carry["input"], row["input"])
            _, back = jax.vjp(lambda own: self.blocks(own, x_BTD, row), own)
            dy_BTD = _take(carry["cotangent"], row["cotangent"])
            return self.with_chunk(sums, back(dy_BTD)[0], row["chunk"])

        here = (row["microbatch"] >= 0) & ~fused
        return carry | {"own": lax.cond(here, run, lambda sums: sums, carry["own"])}

    def with_chunk(
        self, sums: list[jax.Array], gradients: list[jax.Array], chunk: jax.Array
    ) -> list[jax.Array]:
        """Adds the gradients of one chunk's layers."""
        if self.schedule.chunks == 1:
            return _added(sums, gradients)
        new = _added(self.of_chunk(sums, chunk), gradients)
        return [
            lax.dynamic_update_slice_in_dim(a, part, chunk * self.layers, 0)
            for a, part in zip(sums, new, strict=True)
        ]

    def tick(self, carry: Carry, row: dict[str, Any]) -> tuple[Carry, None]:
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
