"""A step of a small decoder with and without stages, and how far two of them are apart."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from parallel.precision import PrecisionConfig
from tests.small import DECODER, B, initial_params, layout
from training.optim import OptimizerConfig, make_optimizer
from training.state import create_state
from training.step import loss_and_grads, make_step

FLOAT32 = PrecisionConfig()
TOLERANCE = 1e-5  # as of other layouts, `tests/training/test_layouts.py`
DEEP = replace(DECODER, layers=4)
MICROBATCHES = 4


def step(microbatches=MICROBATCHES, config=DEEP, precision=FLOAT32, scale=1.0, rows=B, **kind):
    """(sums, gradients) as NumPy; dropout is on, rows hold documents and padding."""
    with layout(config=config, rows=rows, **kind) as laid:
        grads_of = jax.jit(loss_and_grads(laid.model, precision, microbatches))
        params, batch = laid.params(initial_params(config)), laid.batch(rows=rows)
        sums, grads = grads_of(params, batch, jax.random.key(7), jnp.float32(scale))
        for grad, names in zip(
            jax.tree.leaves(grads), jax.tree.leaves(laid.model.axes), strict=True
        ):
            assert jax.typeof(grad).sharding.spec == laid.model.rules.of_gradient(names, grad.shape)
        return jax.tree.map(np.asarray, (sums, grads))


@functools.cache
def one_device(microbatches=MICROBATCHES, config=DEEP, rows=B, precision=FLOAT32, scale=1.0):
    return step(microbatches, config, precision, scale, rows)


def norm(tree) -> float:
    return float(
        np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree)))
    )


def shares(got, want) -> dict[str, float]:
    """For each gradient, its difference as a share of max(its norm, 1e-3 of the norm of all)."""
    floor = 1e-3 * norm(want)
    pairs = zip(jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True)
    return {jax.tree_util.keystr(path): norm(g - w) / max(norm(w), floor) for (path, w), g in pairs}


def assert_same(got, want):
    """Of (sums, gradients)."""
    assert got[0].keys() == want[0].keys()
    for name, value in want[0].items():
        np.testing.assert_allclose(got[0][name], value, rtol=TOLERANCE, err_msg=name)
    for name, share in shares(got[1], want[1]).items():
        assert share <= TOLERANCE, name


def ten_losses(microbatches=MICROBATCHES, config=DEEP, rows=B, **kind):
    """Losses of a training run, each step on another batch."""
    with layout(config=config, rows=rows, **kind) as laid:
        optimizer = make_optimizer(OptimizerConfig(warmup_steps=2), 10, laid.model.axes)
        state = create_state(laid.model, optimizer, FLOAT32, 0, laid.mesh)
        rate = lambda _: jnp.float32(0)
        made = make_step(laid.model, optimizer, rate, FLOAT32, seed=1, micro_steps=microbatches)
        run, losses = jax.jit(made, donate_argnums=0), []
        for number in range(10):
            state, metrics = run(state, laid.batch(number % 3, rows=rows))
            losses.append(float(metrics["loss"]))
        return losses


ten_on_one_device = functools.cache(ten_losses)
