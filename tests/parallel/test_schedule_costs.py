"""What a schedule takes in time, by hand."""

from __future__ import annotations

import pytest

from parallel.schedule_costs import Costs, ideal, lockstep
from parallel.schedule_kinds import make_schedule

# Sums of whole numbers and quarters: what is left is rounding of float64.
EXACT = 1e-9


def test_a_tick_is_as_long_as_its_slowest_stage():
    """3 micro-batches, the second stage twice as slow: by hand, F 1 2, B 1 2, W 1 2."""
    schedule = make_schedule("1f1b", 2, 3)
    costs = Costs(forward=(1, 2), input_grad=(1, 2), weight_grad=(1, 2))
    # F | F, FBW | FBW, FBW | BW, FBW | BW
    assert lockstep(schedule, costs).ticks == (0, 1, 7, 13, 19)
    assert lockstep(schedule, costs).time == 21
    assert ideal(schedule, costs).time == 21  # the slow stage has 18, 1 before and 2 after it
    assert lockstep(schedule, costs).work == (9, 18)
    assert lockstep(schedule, costs).bubble == 3
    assert lockstep(schedule, costs).bubble_fraction == pytest.approx(15 / 42, abs=EXACT)


def test_transfers_lengthen_the_ticks_that_send_and_every_hop_of_asynchronous_stages():
    schedule = make_schedule("gpipe", 3, 1)  # F F F, B B B: the first F shares no tick
    plain, sent = Costs(), Costs(transfer=0.25)
    assert ideal(schedule, sent).time - ideal(schedule, plain).time == 4 * 0.25
    assert lockstep(schedule, sent).time - lockstep(schedule, plain).time == 4 * 0.25
    turns = make_schedule("zb_v", 1, 1)
    assert ideal(turns, sent).time == ideal(turns, plain).time, "turns of a V stay on their stage"


def test_the_forward_is_computed_again_once_for_a_fused_pair_and_twice_for_one_apart():
    costs = Costs(recompute=1)
    fused, apart = make_schedule("1f1b", 4, 8), make_schedule("zb_h1", 4, 8, form="single")
    assert lockstep(fused, costs).work == (8 * 4,) * 4
    assert lockstep(apart, costs).work == (8 * 5,) * 4


@pytest.mark.parametrize("run", [ideal, lockstep])
def test_the_simulation_says_how_much_is_in_flight(run):
    assert run(make_schedule("1f1b", 4, 8)).in_flight == (7, 5, 3, 1)
    assert run(make_schedule("zb_h1", 4, 8, form="single")).in_flight == (4, 4, 4, 4)
    assert run(make_schedule("interleaved", 4, 8)).in_flight == (5.5, 4.5, 3.5, 2.5)


def test_a_stages_cost_is_divided_among_its_chunks_unless_they_have_their_own():
    schedule = make_schedule("interleaved", 2, 2, 2)
    even = lockstep(schedule, Costs(forward=(2, 4)))
    own = lockstep(schedule, Costs(forward=((1, 1), (2, 2))))
    assert even == own
    uneven = lockstep(schedule, Costs(forward=((0.5, 1.5), (2, 2))))
    assert uneven.work == even.work


@pytest.mark.parametrize(
    ("costs", "why"),
    [
        (
            Costs(forward=(1, 2)),
            (
                "forward costs (1, 2): give one number, one for each of 4 stages, or for each "
                "stage one for each of 1 chunks"
            ),
        ),
        (
            Costs(recompute=(1, 2, 3, (1, 2))),  # type: ignore[arg-type]
            (
                "recompute costs (1, 2, 3, (1, 2)): give one number, one for each of 4 stages, or "
                "for each stage one for each of 1 chunks"
            ),
        ),
        (Costs(weight_grad=-1), "weight_grad costs -1: a time is not negative"),
        (Costs(transfer=-1), "transfer costs -1: a time is not negative"),
    ],
)
def test_costs_that_fit_no_stage_are_refused(costs, why):
    with pytest.raises(ValueError) as caught:
        lockstep(make_schedule("1f1b", 4, 8), costs)
    assert str(caught.value) == why
