"""A plan's pipeline for people: schedule, stages, slots, bubble, and a drawing of its timeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from memory import timeline
from memory.job import Job
from memory.roofline import actions_of
from memory.stage_time import action_costs
from parallel.schedule import Schedule
from parallel.schedule_costs import Costs, ideal, lockstep
from parallel.targets import Target

# Of which stage the phase is that needs most memory; all others are of every stage.
STAGE_OF = {"loss": "the last stage's loss", "embedding": "the first stage's embedding"}
# Actions that a drawing has room for.
DRAWN = 4000


@dataclass(frozen=True)
class PipelineFigures:
    """What `plan.py` says of a pipeline.

    Attributes:
      schedule: the table.
      costs: predicted seconds of its actions.
      layers: of each chunk, in the model's order.
      slots: buffer -> slots on every stage.
      decides: what needs most memory.
    """

    schedule: Schedule
    costs: Costs
    layers: tuple[int, ...]
    slots: dict[str, int]
    decides: str

    def grade(self) -> dict[str, Any]:
        """As plain data; bubbles are seconds that the stage with the most work waits."""
        alone, ticks = ideal(self.schedule, self.costs), lockstep(self.schedule, self.costs)
        return {
            "schedule": self.schedule.name,
            "stages": self.schedule.stages,
            "microbatches": self.schedule.microbatches,
            "chunks": self.schedule.chunks,
            "layers": list(self.layers),
            "ticks": len(self.schedule.ticks),
            "slots": self.slots,
            "bubble_lockstep": ticks.bubble / ticks.time,
            "bubble_ideal": alone.bubble / alone.time,
            "seconds_lockstep": ticks.time,
            "seconds_ideal": alone.time,
            "decides": self.decides,
        }

    def drawing(self) -> str:
        """The timeline as an `<svg>`, or why there is none; a unit is an average forward."""
        actions = sum(1 for _ in self.schedule.actions())
        if actions > DRAWN:
            return (
                f"Not drawn: the {actions:,} actions of this table are more than the {DRAWN:,} "
                "that can be told apart. With fewer config.pipeline.microbatches it is drawn."
            )
        unit = float(np.mean(np.array(self.costs.forward))) or 1.0
        scaled = {
            name: (np.array(getattr(self.costs, name)) / unit).round(2).tolist()
            for name in ("forward", "input_grad", "weight_grad", "recompute", "transfer")
        }
        return timeline.fragment(self.schedule, replace(self.costs, **scaled))


def pipeline_figures(job: Job, target: Target, phases: Mapping[str, int]) -> PipelineFigures | None:
    """The figures of a job; None where it has no stages.

    Args:
      phases: phase -> bytes, as predicted.
    """
    if job.pipeline is None:
        return None
    actions = actions_of(job, target)
    stages = actions.stages
    largest = max(phases, key=lambda name: phases[name])
    return PipelineFigures(
        job.pipeline.table(stages.table.stages, job.micro_steps),
        action_costs(actions),
        stages.division,
        {name: size for name, size in stages.table.capacity.items() if size},
        STAGE_OF.get(largest, "what every stage does"),
    )
