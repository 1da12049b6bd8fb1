"""Pipeline schedules as data: a table of ticks x stages, and the check that it can be run.

A cell of the table holds what one stage does in one tick: at most one forward (F), one gradient by
the input (B) and one gradient by the weights (W), run in this order, each of one micro-batch and
one of the stage's chunks of layers. In the cell of its B, a W is fused with it, one backward pass
gives both, unless a W of another stage stands apart in that tick. What F or B of a tick produce is
sent at its end and is there in the next tick.

A table is built from each stage's order by `parallel/schedule_orders.py`, one's own too; those of
the literature are in `parallel/schedule_kinds.py`. What a table takes in time is told by
`parallel/schedule_costs.py`, what in buffers by `parallel/schedule_slots.py`; an executor reads
`parallel/schedule_program.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal, NamedTuple, get_args

KINDS = ("F", "B", "W")  # in the order in which a cell runs them
Path = Literal["loop", "v"]


class Action(NamedTuple):
    """One piece of work of a stage: `kind` is F, B or W."""

    kind: str
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind} of micro-batch {self.microbatch}, chunk {self.chunk}"


def F(microbatch: int, chunk: int = 0) -> Action:
    """The forward pass of a chunk."""
    return Action("F", microbatch, chunk)


def B(microbatch: int, chunk: int = 0) -> Action:
    """The gradient by a chunk's input, which the chunk before it waits for."""
    return Action("B", microbatch, chunk)


def W(microbatch: int, chunk: int = 0) -> Action:
    """The gradient by a chunk's weights, which no stage waits for."""
    return Action("W", microbatch, chunk)


Cell = tuple[Action, ...]
# A value is known by what made it: kind of action, position of the chunk in the model, micro-batch.
Value = tuple[str, int, int]


@dataclass(frozen=True)
class Schedule:
    """What each stage does in each tick.

    Attributes:
      name: for messages and drawings.
      ticks: [tick][stage], the cells.
      stages, microbatches, chunks: p, m and v.
      path: how the model's chunks lie on the stages. In a `loop`, each round begins at stage 0; in
        a `v`, every second round runs back, so that the turns stay on one stage.
    """

    name: str
    ticks: tuple[tuple[Cell, ...], ...]
    stages: int
    microbatches: int
    chunks: int = 1
    path: Path = "loop"

    def __post_init__(self) -> None:
        if self.path not in get_args(Path):
            right = " or ".join(get_args(Path))
            raise ValueError(f"schedule {self.name!r}: path = {self.path!r}; choose {right}")

    def position(self, stage: int, chunk: int) -> int:
        """Where a stage's chunk stands in the model: 0 has the embedding, p v - 1 the head."""
        back = self.path == "v" and chunk % 2 == 1
        return chunk * self.stages + (self.stages - 1 - stage if back else stage)

    def place(self, position: int) -> tuple[int, int]:
        """(stage, chunk) of a position."""
        chunk, stage = divmod(position, self.stages)
        return (self.stages - 1 - stage if self.path == "v" and chunk % 2 else stage), chunk

    @property
    def positions(self) -> int:
        """How many chunks the model is cut into, p v."""
        return self.stages * self.chunks

    @cached_property
    def tick_of(self) -> Mapping[Value, int]:
        """The tick of each action."""
        return {self.value(s, action): tick for tick, s, action in self.actions()}

    def fuses(self, position: int, microbatch: int) -> bool:
        """Whether one backward pass gives B and W of a chunk.

        In a tick in which some stage's W is apart from its B, none does: where stages wait for each
        other between B and W, that one would wait for a whole pass and then do its W alone.
        """
        tick = self.tick_of["W", position, microbatch]
        together = tick == self.tick_of["B", position, microbatch]
        return together and tick not in self._apart

    @cached_property
    def _apart(self) -> frozenset[int]:
        """The ticks that have a W of another tick's B."""
        return frozenset(
            tick
            for (kind, position, microbatch), tick in self.tick_of.items()
            if kind == "W" and tick != self.tick_of["B", position, microbatch]
        )

    @cached_property
    def fused(self) -> bool:
        """Whether every W is in the cell of its B: no stage ever sends before both are done."""
        return not self._apart

    def value(self, stage: int, action: Action) -> Value:
        """What an action of a stage makes."""
        return action.kind, self.position(stage, action.chunk), action.microbatch

    def actions(self) -> Iterator[tuple[int, int, Action]]:
        """(tick, stage, action), tick by tick."""
        for tick, row in enumerate(self.ticks):
            for stage, cell in enumerate(row):
                for action in cell:
                    yield tick, stage, action

    def needs(self, value: Value) -> list[Value]:
        """The values that an action reads, by the action that makes them."""
        kind, position, microbatch = value
        if kind == "F":
            return [("F", position - 1, microbatch)] if position else []
        if kind == "W":
            return [("B", position, microbatch)]
        last = position == self.positions - 1
        after = [] if last else [("B", position + 1, microbatch)]
        return [("F", position, microbatch), *after]

    def named(self, value: Value) -> str:
        """A value in words, with its stage."""
        stage, chunk = self.place(value[1])
        return f"{Action(value[0], value[2], chunk)} on stage {stage}"


def check(schedule: Schedule) -> None:
    """Refuses a table that no executor could run.

    Raises:
      ValueError: naming tick and stage: a cell that holds two actions of a kind or holds them out
        of order, an action that is there twice or never, a value that is read before it arrives.
    """
    ticks = _ticks(schedule)
    for tick, stage, action in schedule.actions():
        value = schedule.value(stage, action)
        for needed in schedule.needs(value):
            # In the cell itself, F comes before B and B before W; all else was sent before.
            if needed not in ticks or ticks[needed] > tick - (needed[1] != value[1]):
                why = "which is in no tick"
                if needed in ticks:
                    why = f"which is done in tick {ticks[needed]}, for later ticks"
                place = where(schedule, tick, stage)
                raise ValueError(f"{place}: {action} lacks {schedule.named(needed)}, {why}")
    for kind, position, microbatch in product(
        KINDS, range(schedule.positions), range(schedule.microbatches)
    ):
        if (kind, position, microbatch) not in ticks:
            stage, chunk = schedule.place(position)
            place = where(schedule, len(schedule.ticks) - 1, stage)
            missing = Action(kind, microbatch, chunk)
            raise ValueError(f"{place}: the table ends without {missing}")


def _ticks(schedule: Schedule) -> dict[Value, int]:
    """The tick of each action; the form of every cell is checked."""
    m, v = schedule.microbatches, schedule.chunks
    for tick, row in enumerate(schedule.ticks):
        if len(row) != schedule.stages:
            raise ValueError(
                f"schedule {schedule.name!r}, tick {tick}: {len(row)} cells for "
                f"{schedule.stages} stages; a stage without work has an empty one"
            )
    ticks: dict[Value, int] = {}
    for tick, stage, action in schedule.actions():
        place = where(schedule, tick, stage)
        cell = schedule.ticks[tick][stage]
        kinds = [other.kind for other in cell]
        if kinds != [kind for kind in KINDS if kind in kinds]:
            raise ValueError(
                f"{place}: the cell holds {', '.join(map(str, cell))}; right is one F, one B, "
                "one W at most, in this order"
            )
        if not (0 <= action.microbatch < m and 0 <= action.chunk < v):
            raise ValueError(f"{place}: {action}; there are {m} micro-batches, {v} chunks a stage")
        value = schedule.value(stage, action)
        if value in ticks:
            raise ValueError(f"{place}: {action} again; it was done in tick {ticks[value]}")
        ticks[value] = tick
    return ticks


def where(schedule: Schedule, tick: int, stage: int) -> str:
    """The place of an error."""
    return f"schedule {schedule.name!r}, tick {tick}, stage {stage}"
