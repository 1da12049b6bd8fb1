"""A pipeline computes what the unpipelined step with the same micro-batches does."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel.when
from parallel.pipeline import PipelineConfig
from parallel.precision import PrecisionConfig
from parallel.schedule import KINDS
from parallel.schedule_kinds import FORMS, make_schedule
from tests.small import DECODER, B, layout
from tests.training.stages import (
    DEEP,
    MICROBATCHES,
    TOLERANCE,
    assert_same,
    norm,
    one_device,
    step,
    ten_losses,
    ten_on_one_device,
)
from training import pipelined as pipelined_step
from training.optim import OptimizerConfig, make_optimizer
from training.state import create_state
from training.step import make_step

REMAT = ("full", "none")


def pipelined(schedule="1f1b", form="", microbatches=MICROBATCHES, config=DEEP, layers=(), **kind):
    pipeline = PipelineConfig(
        schedule=schedule, form=form, microbatches=microbatches, layers=layers
    )
    return step(microbatches, config, pipeline=pipeline, **kind)


@pytest.mark.parametrize("remat", REMAT)
def test_two_stages(remat):
    assert_same(pipelined("1f1b", pipe=2, remat=remat), one_device())


# A part of all cases of schedule, mesh and remat: `benchmarks/pipeline_equality.py` has all.
MESHES = [
    dict(pipe=4),
    dict(pipe=2, data=2),
    dict(pipe=2, fsdp=2, zero=1),
    dict(pipe=2, fsdp=2, zero=2),
    dict(pipe=2, fsdp=2, zero=3),
    dict(pipe=2, tensor=2),
    dict(pipe=2, tensor=2, sequence=True),
    dict(pipe=4, tensor=2, sequence=True),
    dict(pipe=2, data=2, fsdp=2, zero=2, rows=16),
    dict(pipe=2, fsdp=2, tensor=2, zero=3, sequence=True),
]


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "remat"), list(zip(MESHES, cycle(REMAT), strict=False)), ids=str)
def test_stages_beside_other_axes(mesh, remat):
    want = one_device(rows=mesh.get("rows", B))
    assert_same(pipelined(remat=remat, **mesh), want)


TABLES = [(schedule, form) for schedule, forms in FORMS.items() for form in forms]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "form", "remat"),
    [(*table, remat) for table, remat in zip(TABLES, cycle(REMAT), strict=False)]
    + [("1f1b", "wide", "dots"), ("zb_h1", "wide", "dots"), ("zb_h1", "wide", "attention")],
)
def test_every_table(schedule, form, remat, monkeypatch):
    """What was computed is right, and what ran, counted on the devices, is the table."""

    def counted(*args, run=pipelined_step.run_pipeline):
        (total, aux), grads, ran = run(*args)
        return (total, aux | {"ran": ran.astype(jnp.float32)}), grads, ran

    monkeypatch.setattr(pipelined_step, "run_pipeline", counted)
    sums, grads = pipelined(schedule, form, pipe=2, remat=remat)
    table = make_schedule(schedule, 2, MICROBATCHES, form=form)
    cells = np.zeros((len(table.ticks), 2, len(KINDS)))
    for tick, stage, action in table.actions():
        cells[tick, stage, KINDS.index(action.kind)] = 1
    np.testing.assert_array_equal(sums.pop("ran"), cells)
    assert_same((sums, grads), one_device())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "remat"), [("interleaved", "none"), ("zb_h1", "full"), ("zb_v", "none")]
)
def test_chunks_and_weight_gradients_apart_beside_other_axes(schedule, remat):
    mesh = dict(pipe=2, fsdp=2, tensor=2, zero=3, sequence=True)
    assert_same(pipelined(schedule, remat=remat, **mesh), one_device())


@pytest.mark.slow
def test_the_form_for_gpus(monkeypatch):
    """Loops of one turn or none in place of conditionals, see `parallel/when.py`.

    The last stage's W is fused with its B, the first stage's is not.
    """
    want = one_device()
    monkeypatch.setattr(parallel.when, "platform", lambda: "gpu")
    assert_same(pipelined("zb_h1", pipe=2, remat="none"), want)


# A head of its own, learned positions, layer norm after each sum, and layers of two kinds.
OTHER = replace(
    DEEP,
    tied=False,
    positions="learned",
    max_length=32,
    norm="layer",
    norm_position="post",
    window=4,
    pattern=("local", "global"),
)


@pytest.mark.slow
@pytest.mark.parametrize("remat", REMAT)
def test_another_decoder(remat):
    got = pipelined(config=OTHER, pipe=2, fsdp=2, zero=2, remat=remat)
    assert_same(got, one_device(config=OTHER))


# Stages and chunks that differ, each at another end; a chunk of one layer beside one of three.
UNEVEN = [
    ("1f1b", (3, 2), dict(pipe=2, remat="full")),
    ("1f1b", (1, 3, 1), dict(pipe=3, remat="none")),
    ("zb_h1", (1, 4), dict(pipe=2, fsdp=2, zero=2, remat="none")),
    ("interleaved", (1, 2, 1, 1), dict(pipe=2, fsdp=2, zero=3, remat="full")),
    ("zb_v", (2, 1, 1, 1), dict(pipe=2, tensor=2, sequence=True, remat="none")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "layers", "kind"), UNEVEN)
def test_chunks_of_different_numbers_of_layers(schedule, layers, kind):
    config = replace(DECODER, layers=5)
    got = pipelined(schedule, config=config, layers=layers, **kind)
    assert_same(got, one_device(config=config))


@pytest.mark.slow
def test_chunks_of_whole_periods():
    config = replace(OTHER, layers=6)
    got = pipelined(config=config, layers=(2, 4), pipe=2, fsdp=2, zero=2)
    assert_same(got, one_device(config=config))


HALF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # relative error of a rounding


@pytest.mark.slow
@pytest.mark.parametrize(("compute", "schedule"), [("bfloat16", "zb_v"), ("float16", "1f1b")])
def test_half_precision_is_as_near_to_float32_as_on_one_device(compute, schedule):
    """Compilers round bfloat16 where they end a fusion, so stages round elsewhere than one device,
    but as often, and the sum of errors is as large. Sums in half precision would show.
    """
    scale = 1024.0 if compute == "float16" else 1.0
    kind = dict(precision=PrecisionConfig(compute=compute), scale=scale)
    got = pipelined(schedule, pipe=2, remat="full", **kind)
    want, exact = one_device(**kind), one_device()
    assert abs(got[0]["loss"] - exact[0]["loss"]) < HALF[compute] * exact[0]["loss"]

    def errors(grads):
        return [
            norm(g.astype(np.float32) / scale - e)
            for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(exact[1]), strict=True)
        ]

    for g, w in zip(errors(got[1]), errors(want[1]), strict=True):
        assert g <= 1.5 * w


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_ten_steps(schedule):
    want = ten_on_one_device()
    assert want[-1] < want[0] - 0.1, "it learns"
    pipeline = PipelineConfig(schedule, microbatches=MICROBATCHES)
    got = ten_losses(pipe=2, fsdp=2, zero=2, remat="full", pipeline=pipeline)
    assert got == pytest.approx(want, rel=TOLERANCE)


@pytest.mark.slow
def test_a_scaled_loss_that_overflows_skips_the_update():
    """float16: what one stage finds not finite, all stages skip."""
    precision = PrecisionConfig(compute="float16", scale=2.0**24)
    pipeline = PipelineConfig(microbatches=MICROBATCHES)
    with layout(config=DEEP, remat="full", pipe=2, pipeline=pipeline) as laid:
        optimizer = make_optimizer(OptimizerConfig(), 10, laid.model.axes)
        state = create_state(laid.model, optimizer, precision, 0, laid.mesh)
        before = jax.tree.map(np.asarray, state.params)
        rate = lambda _: jnp.float32(0)
        made = make_step(laid.model, optimizer, rate, precision, seed=1, micro_steps=MICROBATCHES)
        state, metrics = jax.jit(made)(state, laid.batch())
        assert int(metrics["skipped"]) == 1
        assert float(state.loss_scale.scale) == 2.0**23
        jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, state.params))
