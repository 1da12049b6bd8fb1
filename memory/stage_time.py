"""How long a step of a pipeline takes at best: ticks, each as long as its longest stage.

An action is as long as its products, what it streams, and what it waits for on links inside the
stage. The time of a step is that of the stage with the most work, what it waits for the others
(the bubble), what is sent between ticks, and what stands before and after them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from memory.stage_work import Actions, Work
from memory.step_time import CEILINGS, StepTime, exposed
from memory.tables import KINDS
from parallel.mesh import PIPE


def stage_time(actions: Actions, model_flops: float) -> StepTime:
    """The roofline of one step.

    Args:
      model_flops: on one device, see `memory.roofline.model_flops`.
    """
    stages, job, target = actions.stages, actions.job, actions.target
    table, ceilings, chip = stages.table, CEILINGS[target.chip.kind], target.chip
    peak = chip.flops(job.precision.compute)

    def timed(work: Work) -> tuple[float, float, dict[str, float], dict[str, float]]:
        compute = work.flops / (peak * ceilings.matrix)
        memory = work.streamed / (chip.memory_bandwidth * ceilings.stream)
        links = {axis: s / ceilings.link for axis, s in work.links.items() if s}
        return compute, memory, links, exposed(links, (compute + memory) * ceilings.overlap)

    works = {
        (kind, position): timed(actions.of(kind, position))
        for kind in KINDS
        for position in range(len(stages.division))
    }
    costs = action_seconds(actions, works)
    busiest = int(table.work(costs).argmax())
    bubble = table.lockstep(costs) - float(table.work(costs)[busiest])
    parts = [(1.0, timed(actions.border))]
    for kind in KINDS:
        for chunk, runs in enumerate(table.runs(kind)[busiest]):
            parts.append((float(runs), works[kind, table.position(busiest, chunk)]))
    sent = actions.transfers / ceilings.link
    parts.append((1.0, (0.0, 0.0, {PIPE: sent}, {PIPE: sent})))
    compute = sum(times * one[0] for times, one in parts)
    memory = sum(times * one[1] for times, one in parts)
    links, waits = (_summed([(times, one[i]) for times, one in parts]) for i in (2, 3))
    whole = compute + memory + sum(waits.values()) + bubble
    return StepTime(compute, memory, links, waits, 0.0, bubble, model_flops / (peak * whole))


def action_seconds(
    actions: Actions, works: Mapping[tuple[str, int], tuple[float, float, Mapping, Mapping]]
) -> dict[str, NDArray[np.float64]]:
    """Kind -> float[stages, chunks]."""
    table = actions.stages.table
    places = np.array(
        [
            [table.position(stage, chunk) for chunk in range(table.chunks)]
            for stage in range(table.stages)
        ]
    )
    seconds = {}
    for kind in KINDS:
        of = [works[kind, position] for position in range(table.stages * table.chunks)]
        each = np.array([compute + memory + sum(w.values()) for compute, memory, _, w in of])
        seconds[kind] = each[places]
    return seconds


def _summed(parts: list[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for times, of in parts:
        for axis, seconds in of.items():
            total[axis] = total.get(axis, 0.0) + times * seconds
    return total
