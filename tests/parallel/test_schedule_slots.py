"""Buffers of a schedule: as many slots as are needed, and not one more."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parallel import schedule_program
from parallel.schedule import B, F
from parallel.schedule_kinds import FORMS, make_schedule
from parallel.schedule_orders import from_orders
from parallel.schedule_slots import (
    BUFFERS,
    check_slots,
    in_flight,
    lifetimes,
    slots,
)

ALL = [(name, form) for name, forms in FORMS.items() for form in forms]


@pytest.mark.parametrize(("name", "form"), ALL)
def test_no_slot_could_be_spared(name, form):
    """Slots are as many as values are alive in the fullest step, counted step by step."""
    schedule = make_schedule(name, 4, 8, form=form)
    counts = slots(schedule).counts
    for buffer, life in lifetimes(schedule).items():
        alive = np.zeros((schedule.stages, 4 * len(schedule.ticks) + 1), int)
        for (position, _), (start, end) in life.items():
            alive[schedule.place(position)[0], start : end + 1] += 1
        assert tuple(alive.max(axis=1)) == counts[buffer]


@pytest.mark.parametrize(("name", "form"), ALL)
def test_in_one_slot_fewer_some_value_finds_its_slot_taken(name, form):
    schedule = make_schedule(name, 4, 8, form=form)
    found = slots(schedule)
    check_slots(schedule, found)
    tried = 0
    for buffer in BUFFERS:
        for stage, n in enumerate(found.counts[buffer]):
            if n > 1:
                tried += 1
                slot = {
                    key: at % (n - 1) if schedule.place(key[0])[0] == stage else at
                    for key, at in found.slot[buffer].items()
                }
                fewer = replace(found, slot={**found.slot, buffer: slot})
                with pytest.raises(ValueError, match=rf"stage {stage}: the {buffer} of .* taken"):
                    check_slots(schedule, fewer)
    assert tried


def test_slots_of_the_tables_that_ship():
    """p 4, m 8: what stays from F on, one entry a stage; of zb_v and interleaved half as large."""

    def residual(name, form):
        return slots(make_schedule(name, 4, 8, form=form)).counts["residual"]

    assert residual("gpipe", "wide") == (8, 8, 8, 8)
    assert residual("1f1b", "wide") == (7, 5, 3, 1)
    assert residual("1f1b", "lean") == residual("1f1b", "single") == (4, 3, 2, 1)
    assert residual("interleaved", "wide") == (11, 9, 7, 5)
    assert residual("zb_h1", "wide") == (7, 6, 6, 6)
    assert residual("zb_h1", "lean") == (5, 4, 3, 3)
    assert residual("zb_h1", "single") == (4, 4, 4, 4)
    assert residual("zb_v", "wide") == residual("zb_v", "single") == (8, 8, 8, 8)


@pytest.mark.parametrize(("name", "form"), ALL)
def test_slots_do_not_grow_with_micro_batches_but_for_gpipe(name, form):
    for p in (2, 4):
        few, many = (slots(make_schedule(name, p, m, form=form)).counts for m in (8 * p, 16 * p))
        if name == "gpipe":
            buffer = "residual"
            assert (max(few[buffer]), max(many[buffer])) == (8 * p, 16 * p)
        else:
            assert few == many


def test_slots_are_kept_as_long_as_the_executor_says():
    """1F1B on 2 stages: the first holds 3 micro-batches, and the tick's own cotangent."""
    schedule = make_schedule("1f1b", 2, 4)
    zeros = (0, 0)
    assert slots(schedule).counts == {
        "input": (0, 1),
        "residual": (3, 1),
        "cotangent": (1, 1),
        "pending": zeros,
    }
    apart = make_schedule("zb_h1", 2, 4, form="single")
    assert slots(apart).counts["cotangent"] == (1, 1)
    assert slots(apart).counts["pending"] == (1, 2)
    assert slots(apart).capacity("residual") == 2


def test_a_slot_that_is_not_free_names_tick_and_stage_and_what_is_in_it():
    schedule = make_schedule("1f1b", 4, 8)
    found = slots(schedule)

    def refused(slot):
        wrong = replace(found, slot={**found.slot, "residual": {**found.slot["residual"], **slot}})
        with pytest.raises(ValueError) as caught:
            check_slots(schedule, wrong)
        return str(caught.value)

    assert refused({(0, 6): 2}) == (
        "schedule '1f1b, wide', tick 6, stage 0: the residual of micro-batch 6, chunk 0 finds its "
        "slot 2 taken by that of micro-batch 2, chunk 0 until tick 8"
    )
    assert refused({(0, 6): 7}) == (
        "schedule '1f1b, wide', tick 6, stage 0: the residual of micro-batch 6, chunk 0 is to be "
        "in slot 7; there are 7"
    )


def test_a_program_is_not_made_of_slots_that_are_not_free(monkeypatch):
    def all_in_one(schedule):
        found = slots(schedule)
        return replace(found, slot={b: dict.fromkeys(of, 0) for b, of in found.slot.items()})

    monkeypatch.setattr(schedule_program, "slots", all_in_one)
    with pytest.raises(ValueError, match="finds its slot 0 taken"):
        schedule_program.make_program(make_schedule("1f1b", 2, 4))


def test_values_that_wait_keep_their_slots():
    """The second stage takes the first stage's three micro-batches only when all are there."""
    schedule = from_orders(
        "late", [[F(0), F(1), F(2), B(2), B(1), B(0)], [F(2), F(1), F(0), B(2), B(1), B(0)]]
    )
    assert slots(schedule).counts["input"] == (0, 3)
    assert slots(schedule).counts["cotangent"] == (1, 3)
    assert in_flight(schedule) == (3, 3)
