"""Every layout computes the same: gradients, loss curves and parameters against one device."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from parallel.precision import PrecisionConfig
from tests.small import initial_params, layout
from training.optim import apply_update, state_specs
from training.state import abstract_params, shardings_of
from training.step import loss_and_grads

STEPS = 10
FLOAT32 = PrecisionConfig()
# fp32 sums in another order differ by about 1e-7 of the largest term; over a network's depth and
# ten steps that grows to about 1e-6; 1e-5 leaves a factor of ten.
TOLERANCE = 1e-5

MESHES = [(d, f, 8 // d // f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8]


def cells():
    """The ten factorisations x ZeRO x sequence, less those where a knob divides nothing."""
    for data, fsdp, tensor in MESHES:
        for zero in (0, 1, 2, 3) if fsdp > 1 else (0,):
            for sequence in (False, True) if tensor > 1 else (False,):
                yield pytest.param(
                    dict(data=data, fsdp=fsdp, tensor=tensor, zero=zero, sequence=sequence),
                    id=f"data{data}-fsdp{fsdp}-tensor{tensor}-zero{zero}{'-sequence' * sequence}",
                )


def trajectory(**kind):
    """(gradients of step 1, losses of AdamW, losses of SGD, parameters after SGD), as NumPy."""
    with layout(**kind) as laid:
        model = laid.model
        params = laid.params(initial_params())
        grads_of = jax.jit(loss_and_grads(model, FLOAT32))
        one, batch = jnp.float32(1), laid.batch()

        def run(optimizer):
            specs = state_specs(optimizer, model.axes, abstract_params(model, FLOAT32), model.rules)
            state = jax.jit(optimizer.init, out_shardings=shardings_of(specs, laid.mesh))(params)
            update = jax.jit(functools.partial(apply_update, optimizer))
            now, losses, first = params, [], None
            for step in range(STEPS):
                key = jax.random.fold_in(jax.random.key(7), step)
                sums, grads = grads_of(now, batch, key, one)
                first = first if first is not None else grads
                now, state, *_ = update(grads, state, now)
                losses.append(float(sums["loss"]))
            return jax.tree.map(np.asarray, (first, losses, now))

        first, adamw_losses, _ = run(optax.adamw(3e-3))
        _, sgd_losses, sgd_params = run(optax.sgd(0.1))
        return first, adamw_losses, sgd_losses, sgd_params


@functools.cache
def one_device():
    return trajectory()


def norm(tree) -> float:
    return float(
        np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree)))
    )


def assert_close_by_norm(got, want):
    """Each tensor within TOLERANCE of max(its norm, 1e-3 of the global norm)."""
    floor = 1e-3 * norm(want)  # a key bias has a gradient of mathematically zero: its norm is noise
    for (path, w), g in zip(jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True):
        assert norm(g - w) <= TOLERANCE * max(norm(w), floor), jax.tree_util.keystr(path)


def assert_same(got, want):
    assert_close_by_norm(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], rtol=TOLERANCE)
    np.testing.assert_allclose(got[2], want[2], rtol=TOLERANCE)
    assert_close_by_norm(got[3], want[3])


def test_the_oracle_learns():
    """Otherwise every layout might agree on doing nothing."""
    gradients, adamw_losses, _, _ = one_device()
    assert norm(gradients) > 0.1
    assert all(norm(g) > 0 for g in jax.tree.leaves(gradients))
    assert adamw_losses[-1] < adamw_losses[0] - 0.05


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, tensor=2), dict(fsdp=8)], ids=str)
def test_the_seed_gives_the_same_parameters_everywhere(sizes):
    with layout(**sizes, zero=3) as laid:
        got = jax.jit(laid.model.init)(jax.random.key(0))
        jax.tree.map(np.testing.assert_array_equal, got, initial_params())


@pytest.mark.parametrize(
    "kind",
    [
        dict(data=2, fsdp=2, tensor=2, zero=3, sequence=True),
        dict(fsdp=8, zero=2),
    ],
    ids=["data2-fsdp2-tensor2-zero3-sequence", "fsdp8-zero2"],
)
def test_two_layouts(kind):
    assert_same(trajectory(**kind), one_device())


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(cells()))
def test_every_layout(kind):
    assert_same(trajectory(**kind), one_device())
