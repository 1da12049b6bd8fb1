"""Schedules of one's own: ten lines make one, and no wrong one passes."""

from __future__ import annotations

import textwrap
from dataclasses import replace

import pytest

import parallel.schedule_orders
from parallel.schedule import Action, B, F, W, check
from parallel.schedule_costs import ideal, lockstep
from parallel.schedule_kinds import make_schedule
from parallel.schedule_orders import from_orders
from parallel.schedule_slots import in_flight


def example():
    """The function in the docstring."""
    text = parallel.schedule_orders.__doc__.partition("    def ahead")
    source = textwrap.dedent("".join(text[1:]).partition("    print(")[0])
    assert len(source.split("\n\n")[0].splitlines()) - 2 <= 10  # but the def and its comment
    names = {"F": F, "B": B, "from_orders": from_orders}
    exec(source, names)
    return names["ahead"]


def test_a_schedule_of_ten_lines_trades_bubble_for_memory():
    schedules = [example()(4, 8, most) for most in (4, 5, 6, 7, 8)]
    assert [in_flight(schedule)[0] for schedule in schedules] == [4, 5, 6, 7, 8]
    bubbles = [lockstep(schedule).bubble for schedule in schedules]
    assert bubbles == sorted(bubbles, reverse=True)
    assert bubbles[0] == lockstep(make_schedule("1f1b", 4, 8, form="lean")).bubble
    assert ideal(schedules[0]).idle == (9,) * 4


def test_a_v_of_ones_own_has_the_bubble_of_1f1b_with_p_in_flight():
    """A pair of B and W is fused where no W is listed; time is counted for both."""
    p, m = 4, 8
    orders = []
    for s in range(p):
        timed = []
        for i in range(m):
            timed += [(2 * i + s, 0, F(i, 0)), (2 * i + 2 * p - 1 - s, 0, F(i, 1))]
            timed += [(2 * i + 2 * p - 1 + s, 1, B(i, 1)), (2 * i + 4 * p - 2 - s, 1, B(i, 0))]
        orders.append([action for *_, action in sorted(timed)])
    schedule = from_orders("v", orders, path="v")
    assert schedule.fused
    assert lockstep(schedule).bubble == 3 * (p - 1)
    assert in_flight(schedule) == (p,) * p


@pytest.mark.parametrize(
    ("orders", "why"),
    [
        (
            [[F(0), F(1), B(0), B(1)], [F(0), B(0), B(1)]],
            (
                "schedule 'mine', tick 3, stage 1: B of micro-batch 1, chunk 0 waits for "
                "F of micro-batch 1, chunk 0 on stage 1, which is in no order"
            ),
        ),
        (
            [[F(0), B(0)], [B(0), F(0)]],
            (
                "schedule 'mine', tick 1, stage 1: B of micro-batch 0, chunk 0 waits for "
                "F of micro-batch 0, chunk 0 on stage 1, which comes later in this order"
            ),
        ),
        (
            [[F(0), B(0), F(1), B(1)], [F(1), B(1), F(0), B(0)]],
            (
                "schedule 'mine', tick 1, stage 0: B of micro-batch 0, chunk 0 waits for "
                "B of micro-batch 0, chunk 0 on stage 1, which comes later in that stage's order"
            ),
        ),
        (
            [[F(0), B(0), F(1)], [F(0), B(0)]],
            "schedule 'mine', tick 3, stage 1: the table ends without F of micro-batch 1, chunk 0",
        ),
        (
            [[F(0), B(0), W(0)], [F(0), B(0)]],
            "schedule 'mine', tick 2, stage 1: the table ends without W of micro-batch 0, chunk 0",
        ),
        (
            [[F(0), B(0)], [F(0), Action("X", 0)]],
            (
                "schedule 'mine': X of micro-batch 0, chunk 0; an action is F, B or W of a "
                "micro-batch and a chunk that are counted from 0"
            ),
        ),
        ([[], []], "schedule 'mine' has no actions: give each stage its F's and B's"),
    ],
)
def test_an_order_that_never_ends_names_where_it_stops_and_what_it_lacks(orders, why):
    with pytest.raises(ValueError) as caught:
        from_orders("mine", orders)
    assert str(caught.value) == why


@pytest.mark.parametrize(
    ("tick", "stage", "cell", "why"),
    [
        (
            *(1, 1, ()),
            (
                "tick 2, stage 2: F of micro-batch 0, chunk 0 lacks F of micro-batch 0, chunk 0 "
                "on stage 1, which is in no tick"
            ),
        ),
        (
            *(0, 1, (F(0),)),
            "tick 1, stage 1: F of micro-batch 0, chunk 0 again; it was done in tick 0",
        ),
        (
            *(6, 0, (F(6), W(0))),
            (
                "tick 6, stage 0: W of micro-batch 0, chunk 0 lacks B of micro-batch 0, chunk 0 "
                "on stage 0, which is in no tick"
            ),
        ),
        (*(13, 0, ()), "tick 13, stage 0: the table ends without B of micro-batch 7, chunk 0"),
        (
            *(13, 0, (W(7), B(7))),
            (
                "tick 13, stage 0: the cell holds W of micro-batch 7, chunk 0, "
                "B of micro-batch 7, chunk 0; right is one F, one B, one W at most, in this order"
            ),
        ),
        (
            *(13, 0, (B(6), B(7))),
            (
                "tick 13, stage 0: the cell holds B of micro-batch 6, chunk 0, "
                "B of micro-batch 7, chunk 0; right is one F, one B, one W at most, in this order"
            ),
        ),
        (
            *(13, 0, (B(8),)),
            (
                "tick 13, stage 0: B of micro-batch 8, chunk 0; there are 8 micro-batches, "
                "1 chunks a stage"
            ),
        ),
    ],
)
def test_a_wrong_table_names_tick_and_stage_and_what_is_missing(tick, stage, cell, why):
    good = make_schedule("1f1b", 4, 8)
    rows = [list(row) for row in good.ticks]
    rows[tick][stage] = cell
    with pytest.raises(ValueError) as caught:
        check(replace(good, ticks=tuple(map(tuple, rows))))
    assert str(caught.value) == f"schedule '1f1b, wide', {why}"


def test_what_is_sent_in_a_tick_is_not_there_before_the_next():
    good = make_schedule("1f1b", 2, 2)
    first, second, *rest = good.ticks
    early = replace(good, ticks=((first[0], second[1]), (second[0], ()), *rest))
    with pytest.raises(ValueError) as caught:
        check(early)
    assert str(caught.value) == (
        "schedule '1f1b, wide', tick 0, stage 1: F of micro-batch 0, chunk 0 lacks "
        "F of micro-batch 0, chunk 0 on stage 0, which is done in tick 0, for later ticks"
    )
    with pytest.raises(ValueError, match="tick 1: 1 cells for 2 stages"):
        check(replace(good, ticks=(first, second[:1], *rest)))


def test_a_path_is_a_loop_or_a_v():
    with pytest.raises(ValueError) as caught:
        from_orders("mine", [[F(0), F(0, 1), B(0, 1), B(0)]], path="V")
    assert str(caught.value) == "schedule 'mine': path = 'V'; choose loop or v"


@pytest.mark.parametrize(
    ("orders", "single", "why"),
    [
        ([[F(0), B(0), W(0)]], False, "its orders list the W's"),
        ([[F(0), B(0)]], True, "a tick of a single action has no room"),
    ],
)
def test_w_is_placed_by_one_rule_only(orders, single, why):
    with pytest.raises(ValueError) as caught:
        from_orders("mine", orders, single=single, held=1)
    assert str(caught.value) == f"schedule 'mine': held = 1 would place W's, but {why}"
