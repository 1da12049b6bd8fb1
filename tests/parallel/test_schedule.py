"""Pipeline schedules: what they promise in time, and that no wrong table passes."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import parallel.schedule
from parallel.schedule_costs import ideal, lockstep
from parallel.schedule_kinds import FORMS, make_schedule
from parallel.schedule_slots import in_flight

SIZES = [(4, 8), (4, 16), (8, 24), (8, 64)]
ALL = [(name, form) for name, forms in FORMS.items() for form in forms]
# Times here are sums of halves, thirds and whole units: what is left is rounding of float64.
EXACT = 1e-9


def same(values, wanted) -> bool:
    return list(values) == pytest.approx(list(wanted), abs=EXACT)


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize(
    ("name", "forms", "bubble"),
    [
        ("gpipe", ("wide",), lambda p: 3 * (p - 1)),
        ("1f1b", ("wide", "lean", "single"), lambda p: 3 * (p - 1)),
        ("zb_h1", ("wide", "single"), lambda p: p - 1),
    ],
)
def test_asynchronous_stages_idle_as_long_as_the_papers_say(name, forms, bubble, p, m):
    for form in forms:
        assert same(ideal(make_schedule(name, p, m, form=form)).idle, [bubble(p)] * p)


@pytest.mark.parametrize("v", [1, 2, 3, 4])
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_v_chunks_divide_the_bubble_by_v_in_lockstep_too(p, m, v):
    schedule = make_schedule("interleaved", p, m, v)
    assert same(ideal(schedule).idle, [3 * (p - 1) / v] * p)
    assert same(lockstep(schedule).idle, [3 * (p - 1) / v] * p)
    assert same(ideal(make_schedule("interleaved", p, m, v, "single")).idle, [3 * (p - 1) / v] * p)


@pytest.mark.parametrize(("p", "m"), [*SIZES, (4, 7), (5, 9), (1, 1)])  # from 2p - 1 on
def test_zb_v_leaves_no_stage_idle_between_its_first_and_last_action(p, m):
    schedule = make_schedule("zb_v", p, m)
    for timing in (ideal(schedule), lockstep(schedule)):
        assert same(timing.gaps, [0] * p)
        assert same(timing.fill, [s / 2 for s in range(p)])  # F of half a stage, s times
        assert same(timing.drain, [(p - 1 - s) / 2 for s in range(p)])


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_ticks_of_f_b_and_w_reach_the_ideal_bubble_with_2_p_minus_s_minus_1_in_flight(p, m):
    for name, bubble in (("1f1b", 3 * (p - 1)), ("zb_h1", p - 1)):
        schedule = make_schedule(name, p, m, form="wide")
        assert same(lockstep(schedule).idle, [bubble] * p)
        assert same(in_flight(schedule, "B"), [2 * (p - s) - 1 for s in range(p)])
        assert max(in_flight(schedule, "W")) == 2 * p - 1


@pytest.mark.parametrize(("name", "form", "bubble"), [("1f1b", "lean", 24), ("zb_h1", "lean", 9)])
def test_the_same_ticks_with_p_minus_s_in_flight_have_the_longer_bubble(name, form, bubble):
    """Of `../shared/FACTS.md`, for 4 stages and 8 micro-batches."""
    schedule = make_schedule(name, 4, 8, form=form)
    assert same(lockstep(schedule).idle, [bubble] * 4)
    assert in_flight(schedule, "B") == (4, 3, 2, 1)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_a_form_with_less_in_flight_never_has_the_shorter_bubble_in_the_same_ticks(p, m):
    for name in ("1f1b", "zb_h1"):
        wide, lean = (lockstep(make_schedule(name, p, m, form=f)).bubble for f in ("wide", "lean"))
        assert wide < lean


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_single_actions_of_equal_length_lose_nothing_in_lockstep(p, m):
    for name in ("zb_h1", "zb_v"):
        schedule = make_schedule(name, p, m, form="single")
        assert same(lockstep(schedule).idle, ideal(schedule).idle)
        assert max(in_flight(schedule)) == p


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_a_v_in_ticks_of_f_b_and_w_halves_the_bubble_of_1f1b_with_p_in_flight(p, m):
    schedule = make_schedule("zb_v", p, m, form="wide")
    assert lockstep(schedule).bubble == pytest.approx(3 * (p - 1) / 2, abs=EXACT)
    assert in_flight(schedule) == (p,) * p


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_most_is_in_flight_where_the_formulas_say(p, m):
    def peak(name, form=None, v=None):
        return max(in_flight(make_schedule(name, p, m, v, form)))

    assert peak("gpipe") == m
    assert peak("1f1b", "lean") == peak("1f1b", "single") == p
    for v in (2, 4):
        assert peak("interleaved", v=v) == pytest.approx(p * (1 + (p - 1) / (p * v)), abs=EXACT)


@pytest.mark.parametrize(("name", "form"), ALL)
def test_every_size_that_is_accepted_can_be_run(name, form):
    made = 0
    for p in range(1, 6):
        for m in range(1, 13):
            for v in (1, 2, 3) if name == "interleaved" else (None,):
                if m < p * (name != "gpipe") or (name == "interleaved" and m % p):
                    with pytest.raises(ValueError, match=f"microbatches = {m}: {name} needs"):
                        make_schedule(name, p, m, v, form)
                else:
                    schedule = make_schedule(name, p, m, v, form)  # it is checked there
                    assert (schedule.stages, schedule.microbatches) == (p, m)
                    assert lockstep(schedule).time >= ideal(schedule).time - EXACT
                    made += 1
    assert made


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (
            ("zb", 4, 8),
            "config.pipeline.schedule = 'zb': choose one of gpipe, 1f1b, interleaved, zb_h1, zb_v",
        ),
        (("1f1b", 0, 8), "config.mesh.pipe = 0: a pipeline has at least one stage"),
        (
            ("1f1b", 4, 3),
            (
                "config.pipeline.microbatches = 3: 1f1b needs at least 4 for 4 stages; gpipe takes "
                "any number"
            ),
        ),
        (
            ("gpipe", 4, 0),
            "config.pipeline.microbatches = 0: gpipe needs at least 1 for 4 stages",
        ),
        (
            ("interleaved", 4, 6),
            (
                "config.pipeline.microbatches = 6: interleaved needs a multiple of the 4 stages, "
                "such as 4 or 8"
            ),
        ),
        (("interleaved", 4, 8, 0), "config.pipeline.chunks = 0: interleaved wants 1 or more"),
        (("zb_v", 4, 8, 3), "config.pipeline.chunks = 3: zb_v wants 2"),
        (("1f1b", 4, 8, 2), "config.pipeline.chunks = 2: 1f1b wants 1"),
        (("zb_v", 4, 8, 2, "lean"), "config.pipeline.form = 'lean': zb_v comes as single, wide"),
    ],
)
def test_what_a_schedule_cannot_do_is_refused_by_its_config_key(arguments, why):
    with pytest.raises(ValueError) as caught:
        make_schedule(*arguments)
    assert str(caught.value) == why


def test_b_and_w_are_fused_on_all_stages_of_a_tick_or_on_none():
    """Stages that wait for each other between the two would wait for a whole pass, then for a W."""
    seen = set()
    for name, form in (("1f1b", "wide"), ("zb_h1", "wide"), ("zb_h1", "lean"), ("zb_v", "wide")):
        schedule = make_schedule(name, 4, 16, form=form)
        for row in schedule.ticks:
            cells = [
                {a.kind: (schedule.position(s, a.chunk), a.microbatch) for a in cell}
                for s, cell in enumerate(row)
            ]
            both = [c["W"] for c in cells if "W" in c and c["W"] == c.get("B")]
            apart = [c["W"] for c in cells if "W" in c and c["W"] != c.get("B")]
            assert {schedule.fuses(*w) for w in apart} <= {False}
            assert {schedule.fuses(*w) for w in both} <= {not apart}
            seen |= {(name, bool(both), bool(apart))}
    assert {("1f1b", True, False), ("zb_h1", True, True), ("zb_v", True, False)} <= seen


def test_schedules_are_plain_python():
    files = sorted(Path(parallel.schedule.__file__).parent.glob("schedule*.py"))
    assert len(files) == 7
    for file in files:
        names = {
            name
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in [getattr(node, "module", None) or node.names[0].name]
        }
        ours = {name for name in names if name.startswith(("numpy", "parallel.schedule"))}
        others = {name.partition(".")[0] for name in names - ours}
        assert others <= sys.stdlib_module_names, file
