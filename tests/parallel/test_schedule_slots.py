"""Buffers of a schedule: as many slots as are needed, and not one more."""

from __future__ import annotations

import numpy as np
import pytest

from parallel.schedule import B, F
from parallel.schedule_kinds import FORMS, make_schedule
from parallel.schedule_orders import from_orders
from parallel.schedule_slots import (
    BUFFERS,
    check_slots,
    in_flight,
    lifetimes,
    ring_sizes,
    slots,
)

ALL = [(name, form) for name, forms in FORMS.items() for form in forms]


@pytest.mark.parametrize(("name", "form"), ALL)
def test_no_slot_could_be_spared(name, form):
    """Slots are as many as values are alive in the fullest step, counted step by step."""
    schedule = make_schedule(name, 4, 8, form=form)
    counts = slots(schedule).counts
    check_slots(schedule, counts)
    for buffer, life in lifetimes(schedule).items():
        alive = np.zeros((schedule.stages, 4 * len(schedule.ticks) + 1), int)
        for (position, _), (start, end) in life.items():
            alive[schedule.place(position)[0], start : end + 1] += 1
        assert tuple(alive.max(axis=1)) == counts[buffer]
        for stage in range(schedule.stages):
            fewer = [n - (s == stage) for s, n in enumerate(counts[buffer])]
            if min(fewer) >= 0:
                with pytest.raises(ValueError, match=rf"tick \d+, stage {stage}: no slot for the"):
                    check_slots(schedule, {buffer: fewer})


@pytest.mark.parametrize(("name", "form"), ALL)
def test_a_ring_of_each_chunk_is_as_small_as_micro_batch_mod_n_allows(name, form):
    schedule = make_schedule(name, 3, 6, form=form)
    life = lifetimes(schedule)
    for buffer in BUFFERS:
        for stage, sizes in enumerate(ring_sizes(schedule, buffer)):
            for chunk, n in enumerate(sizes):
                position = schedule.position(stage, chunk)
                spans = [life[buffer].get((position, i)) for i in range(6)]

                def clashes(n, spans=spans):
                    return any(
                        a and b and a[0] <= b[1] and b[0] <= a[1]
                        for j, b in enumerate(spans)
                        for a in spans[j % n : j : n]
                    )

                assert not n or not clashes(n)
                assert all(clashes(k) for k in range(1, n))


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


def test_a_table_with_too_few_slots_names_tick_and_stage_and_what_is_in_them():
    schedule = make_schedule("1f1b", 4, 8)
    with pytest.raises(ValueError) as caught:
        check_slots(schedule, {"residual": (6, 5, 3, 1)})
    assert str(caught.value) == (
        "schedule '1f1b, wide', tick 6, stage 0: no slot for the residual of micro-batch 6, "
        "chunk 0; there are 6, which hold 0.0, 1.0, 2.0, 3.0, 4.0, 5.0 (micro-batch.chunk)"
    )
    for counts, why in (
        ({"residual": (7, 5)}, "residual slots: 2 counts for 4 stages"),
        ({"outputs": (1,)}, "buffer 'outputs': choose of input, residual, cotangent, pending"),
    ):
        with pytest.raises(ValueError) as caught:
            check_slots(schedule, counts)
        assert str(caught.value) == why


def test_values_that_wait_keep_their_slots():
    """The second stage takes the first stage's three micro-batches only when all are there."""
    schedule = from_orders(
        "late", [[F(0), F(1), F(2), B(2), B(1), B(0)], [F(2), F(1), F(0), B(2), B(1), B(0)]]
    )
    assert slots(schedule).counts["input"] == (0, 3)
    assert slots(schedule).counts["cotangent"] == (1, 3)
    assert in_flight(schedule) == (3, 3)
