"""The arrays of a schedule: an executor that follows them finds every value."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parallel.schedule_kinds import FORMS, make_schedule
from parallel.schedule_program import make_program
from parallel.schedule_slots import BUFFERS

ALL = [(name, form) for name, forms in FORMS.items() for form in forms]


class Follower:
    """Runs a program on names instead of arrays, with nothing but its columns.

    A value is named by what it is, the position of its chunk and its micro-batch; each read states
    which one it must find.
    """

    def __init__(self, program):
        self.program, self.schedule = program, program.schedule
        self.last = self.schedule.positions - 1
        self.buffers = [
            {buffer: [None] * program.slots.counts[buffer][s] for buffer in BUFFERS}
            for s in range(self.schedule.stages)
        ]
        self.done = []

    def at(self, columns, tick, s):
        """(position, micro-batch, {buffer: slot}) of an action, or None."""
        microbatch = int(columns.microbatch[tick, s])
        if microbatch < 0:
            assert columns.chunk[tick, s] == -1
            return None
        position = self.schedule.position(s, int(columns.chunk[tick, s]))
        return position, microbatch, {b: int(getattr(columns, b)[tick, s]) for b in BUFFERS}

    def read(self, s, buffer, slot, wanted):
        assert slot >= 0
        assert self.buffers[s][buffer][slot] == wanted

    def write(self, s, buffer, slot, value):
        assert slot >= 0
        self.buffers[s][buffer][slot] = value

    def forward(self, s, position, i, slot):
        if position > 0:
            self.read(s, "input", slot["input"], ("activation", position - 1, i))
        else:
            assert slot["input"] == -1
        self.write(s, "residual", slot["residual"], ("residual", position, i))
        if position == self.last:
            self.write(s, "cotangent", slot["cotangent"], ("cotangent", self.last + 1, i))

    def backward(self, s, position, i, slot, fused):
        self.read(s, "residual", slot["residual"], ("residual", position, i))
        self.read(s, "cotangent", slot["cotangent"], ("cotangent", position + 1, i))
        if fused:
            assert slot["pending"] == -1
        else:
            self.write(s, "pending", slot["pending"], ("pending", position, i))

    def weight(self, s, position, i, slot, fused):
        if fused:
            return
        self.read(s, "residual", slot["residual"], ("residual", position, i))
        self.read(s, "pending", slot["pending"], ("pending", position, i))

    def tick(self, tick):
        made = {}
        for s in range(self.schedule.stages):
            fused = bool(self.program.fused[tick, s])
            if found := self.at(self.program.forward, tick, s):
                self.forward(s, *found)
                made["F", s] = ("activation", *found[:2])
                self.done.append(("F", *found[:2]))
            if found := self.at(self.program.backward, tick, s):
                self.backward(s, *found, fused)
                made["B", s] = ("cotangent", *found[:2])
                self.done.append(("B", *found[:2]))
            if found := self.at(self.program.weight, tick, s):
                self.weight(s, *found, fused)
                self.done.append(("W", *found[:2]))
        for transfer in self.program.transfers:
            for source, target in transfer.pairs:
                slot = int(transfer.slot[tick, target])
                if slot >= 0:
                    buffer = {"F": "input", "B": "cotangent"}[transfer.kind]
                    self.write(target, buffer, slot, made[transfer.kind, source])

    def run(self):
        for tick in range(len(self.schedule.ticks)):
            self.tick(tick)
        return self.done


@pytest.mark.parametrize(("name", "form"), ALL)
def test_an_executor_of_the_arrays_finds_every_value_in_its_slot(name, form):
    for p, m, v in [(1, 1, None), (2, 4, None), (3, 6, None), (4, 8, None), (3, 6, 3)]:
        if v is not None and name != "interleaved":
            continue
        schedule = make_schedule(name, p, m, v, form)
        program = make_program(schedule)
        done = Follower(program).run()
        assert len(done) == len(set(done)) == 3 * m * schedule.positions  # the busy cells


@pytest.mark.parametrize(("name", "form"), ALL)
def test_every_transfer_is_one_permutation_in_all_ticks(name, form):
    for p in (1, 2, 4):
        program = make_program(make_schedule(name, p, 8, form=form))
        for transfer in program.transfers:
            sources, targets = zip(*transfer.pairs, strict=True)
            assert len(set(sources)) == len(sources)
            assert len(set(targets)) == len(targets)
            shifts = {(target - source) % p for source, target in transfer.pairs}
            assert len(shifts) == 1, "neighbours, in one direction"
            assert shifts <= {0, 1 % p, -1 % p}


def test_only_rounds_and_turns_need_transfers_of_their_own():
    def pairs(name, v=None):
        transfers = make_program(make_schedule(name, 3, 6, v)).transfers
        return [(transfer.kind, transfer.pairs) for transfer in transfers]

    forth, back = ((0, 1), (1, 2)), ((1, 0), (2, 1))
    assert pairs("1f1b") == [("F", forth), ("B", back)]
    assert pairs("interleaved", 2) == [("F", (*forth, (2, 0))), ("B", ((0, 2), *back))]
    assert pairs("zb_v") == [
        *(("F", forth), ("F", ((2, 2),)), ("F", back)),
        *(("B", forth), ("B", ((2, 2),)), ("B", back)),
    ]


def test_the_arrays_tell_a_wrong_slot_from_a_right_one():
    """The check above is one: a program whose slots are off by one does not pass it."""
    program = make_program(make_schedule("1f1b", 2, 4))
    columns = program.backward
    wrong = np.where(columns.residual >= 0, (columns.residual + 1) % 3, -1)
    wrong[:, 1] = columns.residual[:, 1]
    broken = replace(program, backward=replace(columns, residual=wrong))
    with pytest.raises(AssertionError):
        Follower(broken).run()
