"""Rounding by chance: to a neighbour, right on average, small updates kept, alike on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.test_optim import AXES, STEPS, arrays, config_of, place, rules_for
from training.by_layer import unstacked
from training.optim import apply_update, make_optimizer
from training.rounding import rounded, stochastic

BF16 = jnp.bfloat16


@pytest.mark.parametrize("x", [1.0 + 0.3 * 2**-7, -3.7e-5, 0.99999, 2.0**-130, 0.0, 1.0, -0.0])
def test_it_goes_to_a_neighbour_and_is_right_on_average(x):
    count = 2**16  # as many as there are numbers of 16 bits: each comes once
    bits = jnp.arange(count, dtype=jnp.uint16)
    got = np.asarray(stochastic(jnp.full(count, x, jnp.float32), bits), np.float64)
    x = np.float64(np.float32(x))
    assert got.mean() == x  # to the bit
    near = np.float64(np.asarray(x, BF16))
    assert np.all(np.abs(got - x) <= 2**-7 * max(abs(near), 2.0**-126))
    assert len(set(got)) == (1 if near == x else 2)


def test_what_is_not_finite_stays_so():
    x = jnp.array([np.inf, -np.inf, np.nan], jnp.float32)
    got = stochastic(x, jnp.full(3, 2**16 - 1, jnp.uint16))
    np.testing.assert_array_equal(np.asarray(got, np.float32), x)


def test_the_mean_of_what_is_drawn(use_mesh):
    x = {"a": jnp.full((64, 1024), 1.0 + 0.3 * 2**-7), "b": jnp.ones(3, jnp.int32)}
    like = x | {"a": x["a"].astype(BF16)}
    with use_mesh():
        got = rounded(x, like, jax.random.key(0), unstacked)
    up = np.asarray(got["a"], np.float64) - 1
    assert set(np.unique(up)) == {0.0, 2**-7}
    # Of 65,536 draws the share has a standard deviation of 0.0018.
    assert np.mean(up > 0) == pytest.approx(0.3, abs=5 * 0.0018)
    assert got["b"] is x["b"]


def test_updates_too_small_for_bfloat16_add_up(use_mesh):
    """1.0 goes down by 1e-4 a hundred times, a fortieth of what bfloat16 has below it."""
    config = config_of(
        *("sgd",),
        **dict(momentum=0.0, weight_decay=0.0, clip_norm=0.0, warmup_steps=0),
        **dict(schedule="constant", learning_rate=1e-4),
    )
    with use_mesh():
        optimizer = make_optimizer(config, 10, {"a": "embed -> mlp"})
        params = {"a": jnp.ones((32, 32), BF16)}
        grads = {"a": jnp.ones((32, 32), BF16)}
        state = optimizer.init(params)

        @jax.jit
        def run(params, state, keys):
            def step(carry, key):
                params, state = carry
                params, state, *_ = apply_update(optimizer, grads, state, params, rounding=key)
                return (params, state), None

            return jax.lax.scan(step, (params, state), keys)[0]

        drawn, _ = run(params, state, jax.random.split(jax.random.key(0), 100))
        nearest, *_ = jax.jit(lambda p, s: apply_update(optimizer, grads, s, p))(params, state)
    np.testing.assert_array_equal(np.asarray(nearest["a"], np.float32), 1.0)
    # Steps of 2^-8 with probability 1e-4 * 2^8, a hundred times in each of 1,024 places.
    deviation = 2**-8 * np.sqrt(100 * 0.0256 * 0.9744 / 1024)
    mean = np.asarray(drawn["a"], np.float64).mean()
    assert mean == pytest.approx(0.99, abs=5 * deviation)


def trained(name, rules):
    """bfloat16 parameters and state after a few updates."""
    config = config_of(name, stochastic_rounding=True, clip_norm=0.0)
    optimizer = make_optimizer(config, 10, AXES)
    cast = lambda tree: jax.tree.map(lambda a: a.astype(BF16), tree)
    params = place(cast(arrays(0)), rules.at_rest)
    state = jax.jit(optimizer.init)(params)
    types = jax.tree.map(jax.typeof, (params, state))
    step = jax.jit(lambda *args: apply_update(optimizer, *args[:3], rounding=args[3]))
    for i in range(STEPS):
        grads = place(arrays(i + 1), rules.of_gradient)
        key = jax.random.fold_in(jax.random.key(0), i)
        params, state, *_ = step(grads, state, params, key)
    assert jax.tree.map(jax.typeof, (params, state)) == types
    return jax.tree.map(np.asarray, (params, state))


def test_the_same_bits_on_every_mesh(use_mesh):
    """Layer by layer, and all at once where stages divide them; momentum is bfloat16, too."""
    with use_mesh():
        want = trained("lion", rules_for({}, 0))
    for sizes in (dict(fsdp=4, tensor=2), dict(pipe=3, fsdp=2)):
        with use_mesh(**sizes):
            got = trained("lion", rules_for(sizes, 3))
        jax.tree.map(np.testing.assert_array_equal, got, want)
