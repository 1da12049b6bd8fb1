"""Plans of pipelines: slots and rings exact, step times as the table's simulation, compiled bytes."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from config_border import with_values
from configs import tiny
from layouts import all_rows, make_job, staged
from memory.compiled import compile_step, lower_step
from memory.hlo import parse
from memory.hlo_costs import count
from memory.pipeline_figures import pipeline_figures
from memory.plan import remedies
from memory.plan_text import describe
from memory.predict import predict
from memory.rings import kept, pending
from memory.roofline import actions_of, branch_shares, counted_time, step_time
from memory.stage_time import action_costs
from memory.stages import Stages
from memory.tables import _counted, _whole, table
from memory.terms import Terms
from parallel.contract import axes_of
from parallel.schedule_costs import lockstep
from parallel.schedule_kinds import FORMS
from parallel.split import Split
from parallel.stage import INPUTS, RESIDUALS
from parallel.targets import cpu_target, parse_target

TARGET = parse_target("cpu:8")
KINDS = [(name, form) for name, forms in FORMS.items() for form in forms]


def job_of(target=TARGET, **layout):
    fixed = {
        "model__layers": 8,
        "mesh__data": 1,
        "mesh__fsdp": 2,
        "mesh__pipe": 4,
        "pipeline__microbatches": 8,
    }
    values = {f"config.{k.replace('__', '.')}": v for k, v in (fixed | layout).items()}
    return make_job(with_values(tiny.get_config(), {}), target, values)


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [INPUTS, RESIDUALS], ids=["inputs", "residuals"])
@pytest.mark.parametrize(("name", "form"), KINDS)
def test_a_long_table_is_what_it_would_be_if_built(name, form, kept):
    for stages in (2, 3, 4, 6):
        for number in (stages, 6 * stages + 1, 7 * stages, 11 * stages):
            if name == "interleaved" and number % stages:
                continue
            short = table(name, stages, number, 0, form, kept)
            built = _whole(name, stages, number, 0, form, kept)
            assert dict(short.capacity) == dict(built.capacity), (stages, number)
            assert _counted(short) == _counted(built), (stages, number)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize(("name", "form"), KINDS)
def test_a_step_takes_what_the_simulation_of_its_table_says(name, form, remat):
    job = job_of(
        pipeline__schedule=name,
        pipeline__form=form,
        remat__policy=remat,
        pipeline__microbatches=32,
        data__batch_size=64,
    )
    actions, time = actions_of(job, TARGET), step_time(job, TARGET)
    # What is sent is waited for in every tick, and no part of the bubble.
    costs = replace(action_costs(actions), transfer=0.0)
    simulated = lockstep(job.pipeline.table(4), costs)
    assert time.bubble_seconds == pytest.approx(simulated.bubble, rel=1e-9, abs=1e-9)
    border = time.seconds - simulated.time - time.communication_seconds["pipe"]
    assert 0 < border < 0.5 * time.seconds  # the update stands before and after the ticks


def test_more_micro_batches_and_wider_forms_wait_less():
    def bubble(**layout):
        time = step_time(job_of(data__batch_size=128, **layout), TARGET)
        return time.bubble_seconds / time.seconds

    assert bubble(pipeline__microbatches=64) < 0.5 * bubble(pipeline__microbatches=8)
    assert bubble(pipeline__schedule="zb_h1") < bubble() < bubble(pipeline__form="lean")


# --- bytes ----------------------------------------------------------------------------------------

SPLITS = {
    "rms, gated": {},
    "named": dict(remat__policy="dots"),
    "attention": dict(remat__policy="attention"),
    "sequence": dict(mesh__fsdp=1, mesh__tensor=2, parallel__sequence=True),
    "query norms": dict(model__qk_norm=True),
    "blocked": dict(model__attention="blocked"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_what_a_layer_leaves_is_predicted_to_the_byte(name, monkeypatch):
    traced = []
    whole = Split.__init__
    monkeypatch.setattr(Split, "__init__", lambda s, *a: (whole(s, *a), traced.append(s))[0])
    job = job_of(
        pipeline__schedule="zb_h1",
        mesh__pipe=4,
        precision__compute="bfloat16",
        **SPLITS[name],
    )
    lower_step(job, jax.devices())

    def held(shapes):
        return sum(
            math.prod(s.shape)
            * s.dtype.itemsize
            // math.prod(job.sizes[axis] for axis in axes_of(s.sharding.spec))
            for s in shapes
        )

    stages = Stages(Terms(job, TARGET.chip))
    assert stages.kept == held(traced[0].kept)
    assert stages.pending == held(traced[0].pending)
