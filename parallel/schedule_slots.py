"""Buffers of a pipeline schedule: how long each value is kept, and in which slot.

| buffer | what | kept from | to |
| --- | --- | --- | --- |
| input | a chunk's input | the end of the tick of the F that sent it | its F |
| residual | what F keeps for the backward pass | F | the last of B and W |
| cotangent | gradient by a chunk's output | the end of the tick of the B that sent it | B |
| pending | what B leaves for a W that is not fused with it | B | W |

Nothing is sent to the first chunk, which embeds, nor a gradient to the last one: its F computes the
loss, and that is where its cotangent is from. Slots are given by colouring intervals, which
takes exactly as many as values are alive at once (intervals form a perfect graph).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from parallel.schedule import KINDS, Schedule, where

BUFFERS = ("input", "residual", "cotangent", "pending")
Key = tuple[int, int]  # position of the chunk in the model, micro-batch
Lifetimes = dict[Key, tuple[int, int]]  # first and last step, see `_step`
STEPS = len(KINDS) + 1  # of a tick: F, B, W, then what was sent arrives
ARRIVES = len(KINDS)


@dataclass(frozen=True)
class Slots:
    """Where each value of a schedule is kept.

    Attributes:
      counts: for each buffer, how many slots each stage needs; arrays that are the same on all
        stages have `capacity`.
      slot: for each buffer, the slot of a (position, micro-batch), if it has one.
    """

    counts: Mapping[str, tuple[int, ...]]
    slot: Mapping[str, Mapping[Key, int]]

    def capacity(self, buffer: str) -> int:
        """Slots of the fullest stage."""
        return max(self.counts[buffer])


def lifetimes(schedule: Schedule) -> dict[str, Lifetimes]:
    """For each buffer and (position, micro-batch), the first and the last step of what it holds."""
    life: dict[str, Lifetimes] = {buffer: {} for buffer in BUFFERS}
    last = schedule.positions - 1
    for position in range(schedule.positions):
        for i in range(schedule.microbatches):
            f, b, w = (_step(schedule, kind, position, i) for kind in KINDS)
            key = position, i
            if position > 0:
                life["input"][key] = _sent(schedule, "F", position - 1, i), f
            life["residual"][key] = f, w
            apart = not schedule.fuses(position, i)
            end = b if apart else w
            # The last chunk's comes of the loss, which F computes.
            sent = _sent(schedule, "B", position + 1, i) if position < last else f
            life["cotangent"][key] = sent, end
            if apart:
                life["pending"][key] = b, w
    return life


def slots(schedule: Schedule) -> Slots:
    """The fewest slots and who is in which."""
    counts: dict[str, tuple[int, ...]] = {}
    slot: dict[str, Mapping[Key, int]] = {}
    for buffer, life in lifetimes(schedule).items():
        coloured = [_coloured(_on(schedule, life, stage)) for stage in range(schedule.stages)]
        counts[buffer] = tuple(max(colours.values(), default=-1) + 1 for colours in coloured)
        slot[buffer] = {key: n for colours in coloured for key, n in colours.items()}
    return Slots(counts, slot)


def check_slots(schedule: Schedule, found: Slots) -> None:
    """Refuses slots that are not free when a value begins.

    Args:
      schedule: a checked table.
      found: where its values are kept.

    Raises:
      ValueError: naming tick, stage, the value and what is in its slot, or that it has none.
    """
    for buffer, life in lifetimes(schedule).items():
        holder: dict[tuple[int, int], Key] = {}  # (stage, slot) -> what was put there last
        for key, (start, _) in sorted(life.items(), key=lambda item: item[1]):
            stage = schedule.place(key[0])[0]
            slot = found.slot[buffer].get(key, -1)
            place = f"{where(schedule, start // STEPS, stage)}: the {_named(schedule, buffer, key)}"
            if not 0 <= slot < found.counts[buffer][stage]:
                raise ValueError(
                    f"{place} is to be in slot {slot}; there are {found.counts[buffer][stage]}"
                )
            before = holder.get((stage, slot))
            if before is not None and life[before][1] >= start:
                raise ValueError(
                    f"{place} finds its slot {slot} taken by that of "
                    f"{_named(schedule, '', before)} until tick {life[before][1] // STEPS}"
                )
            holder[stage, slot] = key


def _named(schedule: Schedule, buffer: str, key: Key) -> str:
    """A value in words."""
    of = " of " if buffer else ""
    return f"{buffer}{of}micro-batch {key[1]}, chunk {schedule.place(key[0])[1]}"


def in_flight(schedule: Schedule, until: Literal["B", "W"] = "W") -> tuple[float, ...]:
    """The most micro-batches that each stage has between F and B or W; a chunk is 1/v of one."""
    peaks = []
    for stage in range(schedule.stages):
        alive = peak = 0
        for row in schedule.ticks:
            for action in row[stage]:
                alive += (action.kind == "F") - (action.kind == until)
                peak = max(peak, alive)
        peaks.append(peak / schedule.chunks)
    return tuple(peaks)


def _step(schedule: Schedule, kind: str, position: int, microbatch: int) -> int:
    """When an action runs: ticks have one step for each kind, and one for arrivals."""
    return STEPS * schedule.tick_of[kind, position, microbatch] + KINDS.index(kind)


def _sent(schedule: Schedule, kind: str, position: int, microbatch: int) -> int:
    """When what an action sends is there."""
    return STEPS * schedule.tick_of[kind, position, microbatch] + ARRIVES


def _on(schedule: Schedule, life: Lifetimes, stage: int) -> Lifetimes:
    return {key: value for key, value in life.items() if schedule.place(key[0])[0] == stage}


def _coloured(life: Lifetimes) -> dict[Key, int]:
    """The lowest slot that is free when a value begins."""
    until: list[int] = []  # the last step of what is in a slot
    slot = {}
    for key, (start, end) in sorted(life.items(), key=lambda item: (item[1], item[0])):
        free = [n for n, last in enumerate(until) if last < start]
        slot[key] = free[0] if free else len(until)
        until[slot[key] : slot[key] + 1] = [end]
    return slot
