"""A pipeline computes what the unpipelined step with the same micro-batches does."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel.pipeline import PipelineConfig
from parallel.precision import PrecisionConfig
from parallel.schedule_kinds import FORMS
from tests.small import DECODER, initial_params, layout
from training.step import loss_and_grads

FLOAT32 = PrecisionConfig()
TOLERANCE = 1e-5  # as of other layouts, `tests/training/test_layouts.py`
DEEP = replace(DECODER, layers=4)
MICROBATCHES = 4


def step(microbatches=MICROBATCHES, config=DEEP, precision=FLOAT32, scale=1.0, **kind):
    """(sums, gradients) as NumPy; dropout is on, rows hold documents and padding."""
    with layout(config=config, **kind) as laid:
        grads_of = jax.jit(loss_and_grads(laid.model, precision, microbatches))
        params = laid.params(initial_params(config))
        sums, grads = grads_of(params, laid.batch(), jax.random.key(7), jnp.float32(scale))
        for grad, names in zip(
            jax.tree.leaves(grads), jax.tree.leaves(laid.model.axes), strict=True
        ):
            assert jax.typeof(grad).sharding.spec == laid.model.rules.of_gradient(names, grad.shape)
        return jax.tree.map(np.asarray, (sums, grads))


@functools.cache
def one_device(microbatches=MICROBATCHES, config=DEEP):
    return step(microbatches, config)


def norm(tree) -> float:
    return float(
        np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree)))
    )


def assert_same(got, want):
    """Sums, and each gradient within TOLERANCE of max(its norm, 1e-3 of the global norm)."""
    assert got[0].keys() == want[0].keys()
    for name, value in want[0].items():
        np.testing.assert_allclose(got[0][name], value, rtol=TOLERANCE, err_msg=name)
    floor = 1e-3 * norm(want[1])
    for (path, w), g in zip(
        jax.tree.leaves_with_path(want[1]), jax.tree.leaves(got[1]), strict=True
    ):
        assert norm(g - w) <= TOLERANCE * max(norm(w), floor), jax.tree_util.keystr(path)


def pipelined(schedule="1f1b", form="", microbatches=MICROBATCHES, config=DEEP, **kind):
    pipeline = PipelineConfig(schedule=schedule, form=form, microbatches=microbatches)
    return step(microbatches, config, pipeline=pipeline, **kind)


@pytest.mark.parametrize("remat", ["full", "none"])
def test_two_stages(remat):
    assert_same(pipelined("1f1b", pipe=2, remat=remat), one_device())


MESHES = [
    dict(pipe=4),
    dict(pipe=2, data=2),
    dict(pipe=2, fsdp=2, zero=1),
    dict(pipe=2, fsdp=2, zero=2),
    dict(pipe=2, fsdp=2, zero=3),
    dict(pipe=2, tensor=2),
    dict(pipe=2, tensor=2, sequence=True),
    dict(pipe=4, tensor=2, sequence=True),
    dict(pipe=2, data=2, fsdp=2, zero=2),
    dict(pipe=2, fsdp=2, tensor=2, zero=3, sequence=True),
]


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "none"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_stages_beside_other_axes(mesh, schedule, remat):
    assert_same(pipelined(schedule, remat=remat, **mesh), one_device())


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "none", "dots", "attention"])
@pytest.mark.parametrize(
    ("schedule", "form"), [(s, f) for s, forms in FORMS.items() for f in forms]
)
def test_every_table(schedule, form, remat):
    assert_same(pipelined(schedule, form, pipe=2, remat=remat), one_device())


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "none"])
@pytest.mark.parametrize("schedule", ["interleaved", "zb_h1", "zb_v"])
def test_chunks_and_weight_gradients_apart_beside_other_axes(schedule, remat):
    mesh = dict(pipe=2, fsdp=2, tensor=2, zero=3, sequence=True)
    assert_same(pipelined(schedule, remat=remat, **mesh), one_device())


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
@pytest.mark.parametrize("remat", ["full", "none"])
def test_another_decoder(remat):
    got = pipelined(config=OTHER, pipe=2, fsdp=2, zero=2, remat=remat)
    assert_same(got, one_device(config=OTHER))
