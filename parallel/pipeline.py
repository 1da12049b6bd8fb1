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

from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from parallel.division import Division
from parallel.mesh import PIPE
from parallel.rules import Rules
from parallel.schedule import Schedule
from parallel.schedule_kinds import make_schedule
from parallel.schedule_program import Columns, Program, make_program
from parallel.stage import INPUTS, RESIDUALS, Arrays, Cut, Parts, Stage, Sums
from parallel.zero import Tree


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
    division = Division((cut.layers // schedule.positions,) * schedule.positions)
    program = make_program(schedule, INPUTS if cut.inputs else RESIDUALS)
    names: list[str]
    tree: Any
    names, tree = jax.tree.flatten(axes)
    stacked = [name.split()[0] == "layers" for name in names]
    by_stage = tree.unflatten([P(PIPE) if own else P() for own in stacked])
    parts = Parts(tree, stacked)

    def stage(
        leaves: Tree, copy: Tree | None, microbatches: Any, key: jax.Array | None, columns: Any
    ) -> tuple[Sums, Tree]:
        table = jax.tree.map(lambda a: jnp.squeeze(a, 1), columns)  # this stage's
        own, outside = parts.divide(leaves)
        own_copy, outside_copy = parts.divide(copy)
        batch, weights_MBT = microbatches
        arrays = Arrays(own, outside, own_copy, outside_copy, batch, weights_MBT, key)
        carry, ran = Stage(cut, program, division, parts, arrays, accumulate).run(table)
        # Embedding and head are the first and the last stage's, tied or not; others have zeros.
        summed = [lax.psum(g, PIPE) for g in carry["outside"]]
        return lax.psum(carry["sums"], PIPE), parts.join(carry["own"], summed)

    run = jax.shard_map(
        stage,
        in_specs=(by_stage, None if copy is None else by_stage, P(), P(), P(None, PIPE)),
        out_specs=(P(), by_stage),
        axis_names={PIPE},
        check_vma=False,
    )
    order = _layer_order(schedule, cut.layers)
    if order is not None:
        leaves, copy = (_reordered(part, stacked, order) for part in (leaves, copy))
    sums, grads = run(leaves, copy, microbatches, key, _columns(program, division))
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


def _columns(program: Program, division) -> dict[str, Any]:
    """The table as arrays [ticks, stages], for the scan."""
    schedule = program.schedule

    def columns(kind: Columns) -> dict[str, np.ndarray]:
        position = np.full_like(kind.microbatch, -1)
        for tick, stage in np.argwhere(kind.microbatch >= 0):
            position[tick, stage] = schedule.position(int(stage), int(kind.chunk[tick, stage]))
        firsts = np.array([*(division.first(i) for i in range(schedule.positions)), 0], np.int32)
        return asdict(kind) | {
            "position": position,
            "first": firsts[position],
            "layers": np.array(division.layers, np.int32)[position],
        }

    return {
        "F": columns(program.forward),
        "B": columns(program.backward),
        "W": columns(program.weight),
        "fused": program.fused,
        "transfers": [transfer.slot for transfer in program.transfers],
    }
