"""What a pipeline holds: compiled bytes, against its table and against GPipe by autodiff.

The model and its sizes are those of `benchmarks/staged.py`, as published in benchmarks/README.md.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compile_for
from benchmarks import autodiff_pipeline
from benchmarks.staged import ROWS, Program, staged
from config_border import load_config, override
from config_types import plain
from parallel.pipeline import PipelineConfig
from parallel.precision import PrecisionConfig
from parallel.remat import RematConfig
from parallel.schedule_kinds import make_schedule
from parallel.schedule_slots import slots
from parallel.targets import parse_target
from tests.small import DECODER, initial_params, layout
from tests.training.stages import assert_same
from training.causal_lm import causal_lm
from training.step import loss_and_grads

GROWTH = 1.02
CLOSE = 0.05  # of in-flight bytes: the rest of a program differs a little with its table, too
TOKENS, D = ROWS * 128, 128


@functools.cache
def program(schedule="1f1b", form="wide", *, stages=2, microbatches=4, remat="none") -> Program:
    pipeline = dict(pipeline__schedule=schedule, pipeline__form=form)
    return Program(staged({"pipe": stages}, microbatches, remat__policy=remat, **pipeline))


# --- What is computed -----------------------------------------------------------------------------


DEEP = replace(DECODER, layers=4, dropout=0.0)


def run_small(make, **kind):
    """(sums, gradients) of `make(model)` as NumPy."""
    with layout(config=DEEP, **kind) as laid:
        given = laid.params(initial_params(DEEP)), laid.batch(), None, jnp.float32(1)
        return jax.tree.map(np.asarray, jax.jit(make(laid.model))(*given))


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["none", "full"])
def test_1f1b_and_gpipe_by_autodiff_have_the_same_gradients(full):
    def theirs(model):
        return autodiff_pipeline.loss_and_grads(model, PrecisionConfig(), 4, full=full)

    def ours(model):
        return loss_and_grads(model, PrecisionConfig(), 4)

    pipeline = PipelineConfig(microbatches=4)
    remat = "full" if full else "none"
    want, got = (run_small(make, pipe=2, pipeline=pipeline, remat=remat) for make in (theirs, ours))
    assert_same(got, want)


@pytest.mark.slow
def test_the_schedule_of_ones_own_in_the_docs_runs(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "pipeline.md").read_text()
    code = text.split("<!-- own -->\n```python\n")[1].split("```")[0]
    assert code.count("MOST = 3") == 1
    (tmp_path / "ahead.py").write_text(code.replace("MOST = 3", "MOST = 2"))

    def ours(model):
        return loss_and_grads(model, PrecisionConfig(), 4)

    usual = PipelineConfig(microbatches=4)
    own = replace(usual, orders=str(tmp_path / "ahead.py"))
    assert own.table(2).name == "ahead"
    assert slots(own.table(2)).counts["residual"] == (2, 1)
    assert slots(usual.table(2)).counts["residual"] == (3, 1)
    got, want = (run_small(ours, pipe=2, pipeline=p, remat="full") for p in (own, usual))
    assert_same(got, want)


# --- What is held ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb_h1"])
def test_memory_does_not_grow_with_micro_batches(schedule, remat):
    few, many = (program(schedule, microbatches=m, remat=remat).temporaries for m in (4, 32))
    assert many <= GROWTH * few


@pytest.mark.slow
def test_gpipe_holds_every_micro_batch():
    """By so many slots as its table has: what else a program needs does not grow."""
    lean, wide = (program("1f1b", form, stages=4, microbatches=8) for form in ("lean", "wide"))
    slot = (wide.temporaries - lean.temporaries) / 3
    few, many = (program("gpipe", stages=4, microbatches=m).temporaries for m in (8, 24))
    # An input and a cotangent of each micro-batch wait, too.
    assert (many - few) / 16 == pytest.approx(slot + 2 * TOKENS * D * 4, rel=CLOSE)


# Of temporaries of ours, at most this share of GPipe's by autodiff: remat, micro-batches -> share.
SHARES = {("none", 16): 0.45, ("full", 16): 0.65, ("full", 32): 0.40}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "share"), SHARES.items(), ids=str)
def test_1f1b_holds_less_than_gpipe_by_autodiff(case, share):
    remat, microbatches = case

    def theirs(model, e):
        plain = causal_lm(e.model, e.loss, e.rules(), RematConfig(policy="none"))
        full = remat == "full"
        return autodiff_pipeline.loss_and_grads(plain, e.precision, microbatches, full=full)

    experiment = staged({"pipe": 4}, microbatches, remat__policy=remat)
    ours = program(stages=4, microbatches=microbatches, remat=remat).temporaries
    assert ours <= share * Program(experiment, theirs).temporaries


@pytest.mark.slow
def test_in_flight_bytes_are_those_of_the_tables_slots():
    """A slot costs the same whichever table has it; with `full`, the inputs of a stage's layers."""
    stream = TOKENS * D * 4
    cells = [("1f1b", "lean"), ("1f1b", "wide"), ("gpipe", "wide")]
    capacities = [slots(make_schedule(name, 4, 8, form=form)).capacity for name, form in cells]
    assert [capacity("residual") for capacity in capacities] == [4, 7, 8]
    for remat in ("none", "full"):
        lean, wide, gpipe = (
            program(*cell, stages=4, microbatches=8, remat=remat).temporaries for cell in cells
        )
        residual = (wide - lean) / 3  # these two differ in nothing else
        if remat == "full":
            assert residual == pytest.approx(2 * stream, rel=CLOSE)
        few, _, many = (
            capacity("residual") * residual + (capacity("input") + capacity("cotangent")) * stream
            for capacity in capacities
        )
        assert many == pytest.approx(gpipe - (lean - few), rel=CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("stages", [2, 4])
def test_a_stage_is_given_its_part_of_every_table_and_its_layers_alone(stages):
    made = program(stages=stages, microbatches=8)
    params, batch, *_ = made.inputs(abstract=True)
    held = sum(a.size * a.dtype.itemsize for a in batch.values())
    for array in jax.tree.leaves(params):
        part = array.sharding.shard_shape(array.shape)
        if array.ndim > 1:  # all but the gain of the last norm
            assert math.prod(part) * stages == array.size
        held += math.prod(part) * array.dtype.itemsize
    assert 0 <= made.arguments - held < 64  # key and loss scale


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_no_gradient_of_weights_is_kept_by_micro_batch(schedule):
    microbatches = 13  # no dim of the model
    made = program(schedule, stages=4, microbatches=microbatches)
    shapes = {
        tuple(int(n) for n in dims.split(","))
        for dims in re.findall(r"\bf32\[([\d,]+)\]", made.compiled.as_text())
    }
    weights = jax.tree.leaves(made.inputs(abstract=True)[0])
    own = {a.shape[1:] for a in weights if a.ndim > 2}  # of one layer's matrices
    table = make_schedule(schedule, 4, microbatches)
    assert any(shape[0] == 7 for shape in shapes)  # the rings of 2p - 1 slots are read
    for shape in shapes:
        if shape[0] in (microbatches, len(table.ticks)):
            assert not any(shape[-len(w) :] == w for w in own), shape


# --- The compilers of real devices ----------------------------------------------------------------


SMALL = ("mesh.pipe=2", "mesh.fsdp=2", "parallel.sequence=True", "pipeline.schedule=zb_h1")
LARGE = ("mesh.pipe=4", "mesh.fsdp=8", "data.batch_size=128", "data.sequence_length=4096")
LARGE += ("pipeline.microbatches=16", "remat.policy=full")
REAL = [
    ("gpu:h100:1x8", "tiny", SMALL),
    ("tpu:v5e:2x4", "tiny", SMALL),
    ("gpu:h100:8x8", "llama3_8b", LARGE),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config", "keys"), REAL)
def test_behind_a_condition_only_members_of_one_stage_communicate(
    name, config, keys, monkeypatch, tmp_path
):
    target = parse_target(name)
    try:
        target.check_compiler()
    except ValueError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    changes = [f"--config.{key}" for key in ("mesh.data=1", "mesh.tensor=2", *keys)]
    given = override(load_config(f"configs/{config}.py"), changes)
    answer = compile_for.compile_for(plain(given), target)
    assert answer["status"] == "ok", answer["error"]
    assert answer["conditions"] >= 3  # F, B and W
    # An axis "" would be a permute that sends nothing: see `parallel.compilation`.
    axes = {collective["axis"] for collective in answer["in_branches"]}
    assert axes >= {"fsdp", "tensor"}
    assert axes <= {"fsdp", "tensor", "fsdp+tensor"}
