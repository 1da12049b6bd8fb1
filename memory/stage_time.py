"""How long a step of a pipeline takes at best: ticks, each as long as its longest stage.

An action is as long as its products, what it streams, and what it waits for on links inside the
stage. The time of a step is that of the stage with the most work, what it waits for the others
(the bubble), what is sent between ticks, and what stands before and after them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memory.stage_work import Actions, Work
from memory.step_time import CEILINGS, StepTime, exposed
from memory.tables import KINDS
from parallel.mesh import PIPE
from parallel.schedule_costs import Costs


@dataclass(frozen=True)
class Seconds:
    """What an action takes; `links` whole, of which `waits` is not beside other work."""

    compute: float
    memory: float
    links: Mapping[str, float]
    waits: Mapping[str, float]

    @property
    def total(self) -> float:
        return self.compute + self.memory + sum(self.waits.values())


def timed(actions: Actions, work: Work) -> Seconds:
    """The seconds of some work on the target of `actions`."""
    job, chip = actions.job, actions.target.chip
    ceilings = CEILINGS[chip.kind]
    compute = work.flops / (chip.flops(job.precision.compute) * ceilings.matrix)
    memory = work.streamed / (chip.memory_bandwidth * ceilings.stream)
    links = {axis: s / ceilings.link for axis, s in work.links.items() if s}
    return Seconds(compute, memory, links, exposed(links, (compute + memory) * ceilings.overlap))


def stage_time(actions: Actions, model_flops: float) -> StepTime:
    """The roofline of one step.

    Args:
      model_flops: on one device, see `memory.roofline.model_flops`.
    """
    table, chip = actions.stages.table, actions.target.chip
    seconds = {kind: _of_all(actions, kind) for kind in KINDS}
    costs = {kind: _totals(of) for kind, of in seconds.items()}
    work = table.work(costs)
    busiest = int(work.argmax())
    bubble = max(0.0, table.lockstep(costs) - float(work[busiest]))
    sent = actions.transfers / CEILINGS[chip.kind].link
    parts = [(1.0, timed(actions, actions.border)), (1.0, Seconds(0, 0, *[{PIPE: sent}] * 2))]
    for kind, of in seconds.items():
        parts += zip(map(float, table.runs(kind)[busiest]), of[busiest], strict=True)
    compute = sum(times * one.compute for times, one in parts)
    memory = sum(times * one.memory for times, one in parts)
    links = _summed((times, one.links) for times, one in parts)
    waits = _summed((times, one.waits) for times, one in parts)
    whole = compute + memory + sum(waits.values()) + bubble
    mfu = model_flops / (chip.flops(actions.job.precision.compute) * whole)
    return StepTime(compute, memory, links, waits, 0.0, bubble, mfu)


def busiest_stage(actions: Actions) -> int:
    """The stage with the most work."""
    costs = {kind: _totals(_of_all(actions, kind)) for kind in KINDS}
    return int(actions.stages.table.work(costs).argmax())


def bubble_share(actions: Actions) -> float:
    """What the stage with the most work waits for the others, as a share of all else in a step."""
    time = stage_time(actions, 0.0)
    return time.bubble_seconds / (time.seconds - time.bubble_seconds)


def action_costs(actions: Actions) -> Costs:
    """The seconds of actions for the simulations of `parallel.schedule_costs`."""
    F, both, B, W = (_totals(_of_all(actions, kind)) for kind in KINDS)
    again = np.maximum(0.0, B + W - both)  # done once where B and W are together, else twice
    input_grad, weight_grad = (np.maximum(0.0, each - again).tolist() for each in (B, W))
    sends = max(1, actions.stages.table.ticks)
    transfer = actions.transfers / CEILINGS[actions.target.chip.kind].link / sends
    return Costs(F.tolist(), input_grad, weight_grad, again.tolist(), transfer)


def _of_all(actions: Actions, kind: str) -> list[list[Seconds]]:
    """[stages][chunks]."""
    table = actions.stages.table
    of = [timed(actions, actions.of(kind, i)) for i in range(table.stages * table.chunks)]
    return [[of[table.position(s, c)] for c in range(table.chunks)] for s in range(table.stages)]


def _totals(of: list[list[Seconds]]) -> NDArray[np.float64]:
    return np.array([[one.total for one in row] for row in of])


def _summed(parts: Iterable[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for times, of in parts:
        for axis, seconds in of.items():
            total[axis] = total.get(axis, 0.0) + times * seconds
    return total
