"""The executor of pipeline schedules: one program for any table, in one SPMD computation.

Only the pipe axis is Manual (`parallel/by_stage.py`), so each stage runs the column of the table
that is its own, and what a stage computes stays Explicit over the other axes. The members of a
collective over those are of one stage and take the same branch; between stages there is nothing but
one `ppermute` for each transfer of a tick. A tick's actions stand behind a `cond` each: an idle
stage computes nothing.

Everything that outlives a tick is in the carry of one scan: ring buffers with as many slots as the
table needs, and one sum of gradients. The scan is never differentiated; gradients are taken inside
the actions, so that memory grows with the slots and not with the micro-batches.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from parallel.by_stage import by_stage
from parallel.cut import Arrays, Cut, Parts, StageModel, Sums
from parallel.division import Costs, Division, check_layers, divide
from parallel.exchange import to_spread
from parallel.mesh import PIPE
from parallel.rules import Rules, is_shared, is_staged
from parallel.schedule import Schedule
from parallel.schedule_file import read_schedule
from parallel.schedule_kinds import check_names, make_schedule
from parallel.schedule_program import Columns, Program, make_program
from parallel.stage import Stage
from parallel.zero import Tree

BALANCES = ("equal", "cost")


@dataclass(frozen=True)
class PipelineConfig:
    """How stages work together (`config.pipeline`); of no effect where `config.mesh.pipe` is 1.

    Attributes:
      schedule: `gpipe`, `1f1b`, `interleaved`, `zb_h1` or `zb_v`.
      microbatches: parts of a step's batch; they are its gradient accumulation, too.
      chunks: of a stage's layers; 0 for what the schedule usually has.
      form: of the schedule, `wide`, `lean` or `single`; empty for its first.
      balance: `equal`: as many layers in every chunk where that divides, else as `cost`: so that
        the most loaded stage does as little as can be, embedding and loss head counted.
      layers: of every chunk, in the order of the model; () leaves them to `balance`.
      orders: a Python file whose orders of actions are the schedule, in place of `schedule`, `form`
        and `chunks`; see `parallel/schedule_file.py`.
    """

    schedule: str = "1f1b"
    microbatches: int = 8
    chunks: int = 0
    form: str = ""
    balance: str = "equal"
    layers: tuple[int, ...] = ()
    orders: str = ""

    def __post_init__(self) -> None:
        check_names(self.schedule, self.form)
        if self.microbatches < 1:
            raise ValueError(f"config.pipeline.microbatches = {self.microbatches}: at least 1")
        if self.chunks < 0:
            raise ValueError(f"config.pipeline.chunks = {self.chunks}: 1 or more, or 0")
        if self.balance not in BALANCES:
            raise ValueError(
                f"config.pipeline.balance = {self.balance!r}: choose one of {', '.join(BALANCES)}"
            )

    def table(self, stages: int, microbatches: int | None = None) -> Schedule:
        """The schedule.

        Raises:
          ValueError: see `make_schedule` and `read_schedule`.
        """
        form: Any = self.form or None
        count = self.microbatches if microbatches is None else microbatches
        if self.orders:
            return read_schedule(self.orders, stages, count)
        return make_schedule(self.schedule, stages, count, self.chunks or None, form)

    def without_effect(self, stages: int) -> list[str]:
        """What is set and does nothing with so many stages, a sentence each."""
        set_ = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        unused = [("config.mesh.pipe is 1", set_)]
        if stages > 1:
            of_table = [key for key in set_ if key in ("schedule", "chunks", "form")]
            of_layers = [key for key in set_ if key == "balance"]
            unused = [
                (f"config.pipeline.orders = {self.orders!r}", of_table if self.orders else []),
                (f"config.pipeline.layers = {self.layers}", of_layers if self.layers else []),
            ]
        return [
            f"{', '.join(f'config.pipeline.{key}' for key in keys)} "
            f"{'has' if len(keys) == 1 else 'have'} no effect: {why}"
            for why, keys in unused
            if keys
        ]

    def division(
        self, schedule: Schedule, layers: int, period: int = 1, costs: Costs | None = None
    ) -> Division:
        """The layers of every chunk.

        Args:
          schedule: of `table`.
          layers: of the model.
          period: of the pattern of layer kinds.
          costs: of its parts, where no `layers` are given.

        Raises:
          ValueError: the model has too few layers, or those given are not its.
        """
        positions = schedule.positions
        check_layers(layers, positions, period)
        if self.layers:
            self._check_given(positions, layers, period)
            return Division(self.layers)
        if self.balance == "equal" and layers % (positions * period) == 0:
            return Division((layers // positions,) * positions)
        stages = [schedule.place(position)[0] for position in range(positions)]
        return divide(layers, positions, period, costs, stages)

    def _check_given(self, positions: int, layers: int, period: int) -> None:
        key = f"config.pipeline.layers = {self.layers}"
        if len(self.layers) != positions:
            raise ValueError(
                f"{key}: {len(self.layers)} numbers; config.mesh.pipe x chunks a stage = "
                f"{positions} chunks want one each, or () to leave it to config.pipeline.balance"
            )
        if any(number < period or number % period for number in self.layers):
            kinds = ", the kinds in config.model.pattern" if period > 1 else ""
            raise ValueError(f"{key}: each is a multiple of {period}{kinds}, and not 0")
        if sum(self.layers) != layers:
            raise ValueError(
                f"{key}: together {sum(self.layers)}; config.model.layers = {layers} of them are "
                f"to be divided"
            )


def run_pipeline(
    cut: Cut,
    schedule: Schedule,
    division: Division,
    rules: Rules,
    axes: Tree,
    leaves: Tree,
    copy: Tree | None,
    microbatches: tuple[Tree, Tree],
    key: jax.Array | None,
    accumulate: str,
) -> tuple[Sums, Tree, jax.Array]:
    """Runs a schedule.

    Args:
      cut: the model.
      schedule: its table.
      division: the layers of every chunk.
      rules: the layout.
      axes: the tree of logical axis strings of the parameters.
      leaves, copy: of `parallel.zero.laid_out`, stacked arrays in the stages' rows
        (`stage_rows`); `leaves` are differentiated.
      microbatches: (batch, weights), each array [micro-batches, B, ...].
      key: folded with a micro-batch's number if there are several; None stays None.
      accumulate: dtype in which gradients are summed.

    Returns:
      The loss's sums over micro-batches; the gradients, in the model's order of layers and divided
      as `rules.of_gradient`; and int32[ticks, stages, 3], which F, B and W really ran.

    Raises:
      ValueError: see `check_size`.
    """
    check_size(schedule, rules.size((PIPE,)), len(jax.tree.leaves(microbatches)[0]))
    program = make_program(schedule)
    names: list[str]
    tree: Any
    names, tree = jax.tree.flatten(axes)
    stacked = [is_staged(name) for name in names]
    parts = Parts(tree, stacked, [is_shared(name) for name in names if not is_staged(name)])

    def stage(
        leaves: Tree, copy: Tree | None, microbatches: Any, key: jax.Array | None, columns: Any
    ) -> tuple[Sums, Tree, jax.Array]:
        table = jax.tree.map(lambda a: jnp.squeeze(a, 1), columns)  # this stage's
        own, outside = parts.divide(leaves)
        own_copy, outside_copy = parts.divide(copy)
        arrays = Arrays(own, outside, own_copy, outside_copy, microbatches[0], microbatches[1], key)
        model = StageModel(cut, parts, arrays)
        carry, ran = Stage(model, program, division, accumulate).run(table)
        # Embedding and head are the first and the last stage's, tied or not; others have zeros.
        summed = [lax.psum(g, PIPE) for g in carry["outside"]]
        grads = parts.join(carry["own"], summed)
        return lax.psum(carry["sums"], PIPE), grads, jnp.expand_dims(ran, 1)

    rows = stage_rows(schedule, division)
    assert rules.rows == (rows is None), "the layout at rest is of another division"
    divided = jax.tree.map(lambda a, names: rules.in_stage(names, a.shape), leaves, axes)
    columns = jax.tree.map(
        lambda a: jax.reshard(jnp.asarray(a), P(None, PIPE)), _columns(program, division)
    )
    sums, grads, ran = by_stage(
        stage, (P(), divided, P(None, PIPE)), leaves, copy, microbatches, key, columns
    )

    def at_rest(array: jax.Array, names: str, own: bool) -> jax.Array:
        if not own or rows is None:
            return jax.reshard(array, rules.of_gradient(names, array.shape))
        whole = cut.layers, *array.shape[1:]
        return to_spread(array, rules.of_gradient(names, whole), rows)

    return sums, jax.tree.map(at_rest, grads, axes, tree.unflatten(stacked)), ran


def check_size(schedule: Schedule, stages: int, microbatches: int) -> None:
    """Refuses a table that is made for another step: it would run, on a part of the batch or model.

    Raises:
      ValueError: naming its number of stages or micro-batches, and the step's.
    """
    for what, made, wanted, key in (
        ("stages", schedule.stages, stages, "config.mesh.pipe"),
        ("micro-batches", schedule.microbatches, microbatches, "config.pipeline.microbatches"),
    ):
        if made != wanted:
            raise ValueError(
                f"schedule {schedule.name!r} is of {made} {what}, the step has {wanted} ({key}); "
                "make it for as many"
            )


def stage_rows(schedule: Schedule, division: Division) -> list[int] | None:
    """`Division.rows`; None where those are the model's layers in their order."""
    return None if division.in_rows(schedule) else division.rows(schedule)


def _columns(program: Program, division: Division) -> dict[str, Any]:
    """The table as arrays [ticks, stages], for the scan."""
    schedule = program.schedule

    def columns(kind: Columns) -> dict[str, np.ndarray]:
        position, first, layers = (np.full_like(kind.microbatch, -1) for _ in range(3))
        for tick, stage in np.argwhere(kind.microbatch >= 0):
            at = tick, stage
            position[at] = schedule.position(int(stage), int(kind.chunk[at]))
            first[at], layers[at] = division.first(position[at]), division.layers[position[at]]
        return asdict(kind) | {"position": position, "first": first, "layers": layers}

    return {
        "F": columns(program.forward),
        "B": columns(program.backward),
        "W": columns(program.weight),
        "fused": program.fused,
        "transfers": [transfer.slot for transfer in program.transfers],
    }
