"""What a pipeline schedule takes in time: two simulations of one table.

`ideal` lets stages run by themselves: each starts its next action as soon as the one before it is
done and its values are there. That is how papers count bubbles. `lockstep` is how one SPMD program
runs the table: every tick is as long as its slowest stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from parallel.schedule import Action, Schedule, Value
from parallel.schedule_slots import in_flight

# Seconds (or any unit) of a whole stage, all its chunks; of each stage; or of each stage's chunks.
Cost = float | Sequence[float] | Sequence[Sequence[float]]


@dataclass(frozen=True)
class Costs:
    """Times of one micro-batch, in any unit.

    Attributes:
      forward, input_grad, weight_grad: of F, B and W.
      recompute: the forward again, before each backward pass: once for B and W that are fused,
        twice where they are apart.
      transfer: from a stage to another. In lockstep, of each tick in which anything is sent.
    """

    forward: Cost = 1.0
    input_grad: Cost = 1.0
    weight_grad: Cost = 1.0
    recompute: Cost = 0.0
    transfer: float = 0.0


UNIT = Costs()


class Span(NamedTuple):
    """When a stage works on an action."""

    stage: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timing:
    """A simulated run, in the unit of the costs.

    Attributes:
      time: from the first action to the end of the last.
      work: for each stage, what its actions take.
      fill: for each stage, the time before its first action.
      gaps: for each stage, idle time between its first and its last action.
      drain: for each stage, the time after its last action.
      spans: every action, by stage and start.
      in_flight: for each stage, the most micro-batches that are between F and W; a chunk is 1/v of
        one.
      ticks: in lockstep, the times at which ticks begin.
    """

    time: float
    work: tuple[float, ...]
    fill: tuple[float, ...]
    gaps: tuple[float, ...]
    drain: tuple[float, ...]
    spans: tuple[Span, ...]
    in_flight: tuple[float, ...]
    ticks: tuple[float, ...] = ()

    @property
    def idle(self) -> tuple[float, ...]:
        """For each stage, the time in which it does nothing."""
        return tuple(map(sum, zip(self.fill, self.gaps, self.drain, strict=True)))

    @property
    def bubble(self) -> float:
        """Idle time of the stage with the most work: what the pipeline adds to it."""
        return min(self.idle)

    @property
    def bubble_fraction(self) -> float:
        """The share of all stages' time that is idle."""
        return sum(self.idle) / (self.time * len(self.work)) if self.time else 0.0


def ideal(schedule: Schedule, costs: Costs = UNIT) -> Timing:
    """Asynchronous stages, each in the order of its cells; a fused pair sends when it is done."""
    price = _Prices(schedule, costs)
    ready: dict[Value, float] = {}
    free = [0.0] * schedule.stages
    spans = []
    for _, stage, action in schedule.actions():  # tick by tick, values are made before read
        value = schedule.value(stage, action)
        start = free[stage]
        for needed in schedule.needs(value):
            sent = costs.transfer * (schedule.place(needed[1])[0] != stage)
            start = max(start, ready[needed] + sent)
        free[stage] = ready[value] = start + price(stage, action)
        spans.append(Span(stage, action, start, free[stage]))
        if action.kind == "W" and schedule.fused:
            ready["B", value[1], value[2]] = free[stage]
    return _timing(schedule, spans, max(free))


def lockstep(schedule: Schedule, costs: Costs = UNIT) -> Timing:
    """Ticks of one program: each as long as its slowest stage, then what was made is sent."""
    price = _Prices(schedule, costs)
    spans = []
    ticks = []
    now = 0.0
    for row in schedule.ticks:
        ticks.append(now)
        ends = []
        sends = False
        for stage, cell in enumerate(row):
            end = now
            for action in cell:
                start, end = end, end + price(stage, action)
                spans.append(Span(stage, action, start, end))
                sends |= _sends(schedule, stage, action)
            ends.append(end)
        now = max(ends) + costs.transfer * sends
    return _timing(schedule, spans, now, tuple(ticks))


def _sends(schedule: Schedule, stage: int, action: Action) -> bool:
    """Whether an action's result goes to another stage."""
    position = schedule.position(stage, action.chunk)
    target = position + {"F": 1, "B": -1, "W": 0}[action.kind]
    return 0 <= target < schedule.positions and schedule.place(target)[0] != stage


def _timing(
    schedule: Schedule, spans: Sequence[Span], time: float, ticks: tuple[float, ...] = ()
) -> Timing:
    own = [[span for span in spans if span.stage == stage] for stage in range(schedule.stages)]
    work = tuple(sum(span.end - span.start for span in each) for each in own)
    fill = tuple(each[0].start for each in own)
    drain = tuple(time - each[-1].end for each in own)
    gaps = tuple(sum(b.start - a.end for a, b in pairwise(each)) for each in own)
    in_order = tuple(span for each in own for span in each)
    return Timing(time, work, fill, gaps, drain, in_order, in_flight(schedule), ticks)


class _Prices:
    """What each action of a schedule takes."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self.schedule = schedule
        self.of = {
            "F": _spread(schedule, "forward", costs.forward),
            "B": _spread(schedule, "input_grad", costs.input_grad),
            "W": _spread(schedule, "weight_grad", costs.weight_grad),
        }
        self.recompute = _spread(schedule, "recompute", costs.recompute)
        if costs.transfer < 0:
            raise ValueError(f"transfer costs {costs.transfer}: a time is not negative")

    def __call__(self, stage: int, action: Action) -> float:
        price = self.of[action.kind][stage][action.chunk]
        position = self.schedule.position(stage, action.chunk)
        again = action.kind == "B" or (
            action.kind == "W" and not self.schedule.fuses(position, action.microbatch)
        )
        return price + again * self.recompute[stage][action.chunk]


def _spread(schedule: Schedule, name: str, cost: Cost) -> list[list[float]]:
    """[stages, chunks]: a stage's time is divided evenly among its chunks."""
    p, v = schedule.stages, schedule.chunks
    try:
        times = np.asarray(cost, np.float64)
    except ValueError:  # of several lengths
        times = np.empty(0)
    if times.ndim < 2:
        times = np.broadcast_to(times[..., None] / v, (*times.shape, v))
    if times.shape not in ((v,), (p, v)):
        raise ValueError(
            f"{name} costs {cost}: give one number, one for each of {p} stages, or for each stage "
            f"one for each of {v} chunks"
        )
    if not (times >= 0).all():
        raise ValueError(f"{name} costs {cost}: a time is not negative")
    spread: list[list[float]] = np.broadcast_to(times, (p, v)).tolist()
    return spread
