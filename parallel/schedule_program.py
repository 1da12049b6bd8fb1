"""A pipeline schedule as static arrays, for one program that runs any table.

All stages run the same program; stage s reads column s. A tick is

1. F, B and W, in this order, each where `microbatch >= 0`. An action reads its operands from the
   slots in its columns and writes its results: F its `residual`, and in the last chunk the
   `cotangent`, B its `pending`. Where B and W are `fused` (`Schedule.fuses`), one backward pass
   gives both, and there is nothing `pending`.
2. Then the `transfers`: the output of F goes to the input buffer of the stage that has the next
   chunk, what B computed goes to the cotangent buffer of the stage that has the chunk before. One
   transfer is one `ppermute(value, axis, pairs)` in all ticks, of which each stage writes what it
   got to `slot[tick, stage]`, or drops it where that is -1. `pairs` where every source is its own
   destination (the turns of a V; a single stage) need no ppermute.

The forward of the first chunk has no slot for its input: it embeds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parallel.schedule import KINDS, Schedule, check
from parallel.schedule_slots import BUFFERS, Slots, check_slots, slots

Ints = NDArray[np.int32]
SENT = {"F": ("input", +1), "B": ("cotangent", -1)}  # into which buffer, of which next chunk


@dataclass(frozen=True, eq=False)
class Columns:
    """int32[ticks, stages] each, about one kind of action; -1 where there is none.

    Attributes:
      microbatch, chunk: what the action is of.
      input, residual, cotangent, pending: the slots of that chunk and micro-batch; -1 also where
        it has none in this buffer.
    """

    microbatch: Ints
    chunk: Ints
    input: Ints
    residual: Ints
    cotangent: Ints
    pending: Ints


@dataclass(frozen=True, eq=False)
class Transfer:
    """What is sent one way at the end of each tick.

    Attributes:
      kind: F for activations, into input slots; B for their gradients, into cotangent slots.
      pairs: (source, destination), all that are used in any tick.
      slot: int32[ticks, stages]: where the destination writes it, -1 where nothing is sent to it.
    """

    kind: str
    pairs: tuple[tuple[int, int], ...]
    slot: Ints


@dataclass(frozen=True, eq=False)
class Program:
    """A table for the executor.

    Attributes:
      schedule: what it was made of.
      forward, backward, weight: the columns of F, B and W.
      fused: bool[ticks, stages]: one backward pass gives B and W.
      transfers: two in a loop, up to six in a V, two of those within a stage.
      slots: how many there are of each buffer.
    """

    schedule: Schedule
    forward: Columns
    backward: Columns
    weight: Columns
    fused: NDArray[np.bool_]
    transfers: tuple[Transfer, ...]
    slots: Slots


def make_program(schedule: Schedule) -> Program:
    """The arrays of a schedule.

    Raises:
      ValueError: see `parallel.schedule.check` and `parallel.schedule_slots.check_slots`.
    """
    check(schedule)
    found = slots(schedule)
    check_slots(schedule, found)
    forward, backward, weight = (_columns(schedule, found, kind) for kind in KINDS)
    fused = np.zeros((len(schedule.ticks), schedule.stages), bool)
    for tick, stage, action in schedule.actions():
        if action.kind == "W":
            position = schedule.position(stage, action.chunk)
            fused[tick, stage] = schedule.fuses(position, action.microbatch)
    transfers = _transfers(schedule, found)
    return Program(schedule, forward, backward, weight, fused, transfers, found)


def _columns(schedule: Schedule, found: Slots, kind: str) -> Columns:
    names = ("microbatch", "chunk", *BUFFERS)
    shape = len(schedule.ticks), schedule.stages
    arrays = {name: np.full(shape, -1, np.int32) for name in names}
    for tick, stage, action in schedule.actions():
        if action.kind == kind:
            arrays["microbatch"][tick, stage] = action.microbatch
            arrays["chunk"][tick, stage] = action.chunk
            key = schedule.position(stage, action.chunk), action.microbatch
            for buffer in BUFFERS:
                arrays[buffer][tick, stage] = found.slot[buffer].get(key, -1)
    return Columns(**arrays)


def _transfers(schedule: Schedule, found: Slots) -> tuple[Transfer, ...]:
    """One for each kind of value and direction: a ring's last step goes the way of the others."""
    slot: dict[tuple[str, int], Ints] = {}
    pairs: dict[tuple[str, int], set[tuple[int, int]]] = {}
    for tick, stage, action in schedule.actions():
        if action.kind not in SENT:
            continue
        buffer, step = SENT[action.kind]
        position = schedule.position(stage, action.chunk) + step
        if not 0 <= position < schedule.positions:
            continue
        target = schedule.place(position)[0]
        # A loop has one direction for each kind; a V has both, and its turns.
        way = action.kind, step if schedule.path == "loop" else target - stage
        if way not in slot:
            slot[way] = np.full((len(schedule.ticks), schedule.stages), -1, np.int32)
            pairs[way] = set()
        slot[way][tick, target] = found.slot[buffer][position, action.microbatch]
        pairs[way].add((stage, target))
    return tuple(
        Transfer(kind, tuple(sorted(pairs[kind, way])), slot[kind, way])
        for kind, way in sorted(slot, key=lambda key: (key[0] != "F", -key[1]))
    )
