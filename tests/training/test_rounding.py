"""Rounding by chance: to a neighbour, right on average, small updates kept, alike on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.test_optim import config_of, rules_for
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


MESH_AXES = {"up": "layers embed -> mlp", "table": "vocab -> embed"}
SHAPES = {"up": (3, 16, 32), "table": (64, 16)}


def trained(rules):
    """bfloat16 parameters and momentum after two updates."""
    optimizer = make_optimizer(
        config_of("lion", stochastic_rounding=True, clip_norm=0.0), 10, MESH_AXES
    )
    rng = np.random.default_rng(0)

    def drawn(spec_of, dtype):
        return {
            key: jax.device_put(jnp.asarray(rng.normal(size=shape), dtype), spec_of(axes, shape))
            for (key, shape), axes in zip(SHAPES.items(), MESH_AXES.values(), strict=True)
        }

    params = drawn(rules.at_rest, BF16)
    state = jax.jit(optimizer.init)(params)
    types = jax.tree.map(jax.typeof, (params, state))
    step = jax.jit(lambda *args: apply_update(optimizer, *args[:3], rounding=args[3]))
    for i in range(2):
        grads = drawn(rules.of_gradient, jnp.float32)
        params, state, *_ = step(grads, state, params, jax.random.key(i))
    assert jax.tree.map(jax.typeof, (params, state)) == types
    return jax.tree.map(np.asarray, (params, state))


def test_the_same_bits_on_every_mesh(use_mesh):
    """Layer by layer, and all at once where stages divide them; momentum is bfloat16, too."""
    with use_mesh():
        want = trained(rules_for({}, 0))
    for sizes in (dict(fsdp=4, tensor=2), dict(pipe=3, fsdp=2)):
        with use_mesh(**sizes):
            got = trained(rules_for(sizes, 3))
        jax.tree.map(np.testing.assert_array_equal, got, want)
