"""AdamW with moments in 8 and 4 bits: against float32, its bytes, what a step adds to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.test_optim import config_of
from training.optim import BITS, apply_update, make_optimizer

AXES = {"up": "layers embed -> mlp", "gain": "layers norm"}
BYTES = {8: 2 * (1 + 4 / 256), 4: 2 * (0.5 + 4 / 128)}  # of both moments, for each number
# In 8 bits a moment is rounded by up to power / (2 code) of itself, on average 1% with the codes
# that most have, and what is kept of earlier roundings, 0.9 and 0.95 of each a step, is twice that
# and more. In 4 bits a step is a seventh of the root of a block's largest number, in blocks whose
# numbers differ by factors of ten: many are rounded by a half.
FAR = {8: 0.05, 4: 0.65}


def directions(config, axes, shapes, steps):
    """By how much every parameter moves in each of some updates of noisy gradients."""
    optimizer = make_optimizer(config, steps, axes)
    rng = np.random.default_rng(0)
    size = {key: np.exp(rng.normal(size=shape)) for key, shape in shapes.items()}
    params = {key: jnp.zeros(shape) for key, shape in shapes.items()}
    state = optimizer.init(params)
    update = jax.jit(lambda *args: apply_update(optimizer, *args))
    found = []
    for _ in range(steps):
        noisy = {k: np.float32(s * (0.5 + rng.normal(size=s.shape))) for k, s in size.items()}
        new, state, *_ = update(noisy, state, params)
        found.append(jax.tree.map(lambda a, b: np.asarray(a - b), new, params))
        params = new
    return found


def test_updates_are_near_those_of_float32(use_mesh):
    shapes = {"up": (2, 32, 64), "gain": (2, 32)}
    changes = dict(weight_decay=0.0, schedule="constant", warmup_steps=0, clip_norm=0.0)
    with use_mesh():
        want = directions(config_of("adamw", **changes), AXES, shapes, 12)
        for name, bits in BITS.items():
            got = directions(config_of(name, **changes), AXES, shapes, 12)
            # The first update has nothing rounded behind it, and a vector never has.
            np.testing.assert_allclose(got[0]["up"], want[0]["up"], rtol=1e-5)
            for ours, theirs in zip(got, want, strict=True):
                np.testing.assert_allclose(ours["gain"], theirs["gain"], rtol=1e-4, atol=1e-7)
                off = np.linalg.norm(ours["up"] - theirs["up"])
                assert off < FAR[bits] * np.linalg.norm(theirs["up"]), (name, off)


def compiled(name, layers):
    """A compiled update of six stacks of matrices, and how many numbers they have."""
    axes = dict.fromkeys("abcdef", AXES["up"])
    optimizer = make_optimizer(config_of(name), 10, axes)
    params = {key: jax.ShapeDtypeStruct((layers, 64, 256), jnp.float32) for key in axes}
    state = jax.eval_shape(optimizer.init, params)

    def step(state, params, grads):
        params, state, *_ = apply_update(optimizer, grads, state, params)
        return state, params

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(state, params, params)
    return lowered.compile().memory_analysis(), 6 * layers * 64 * 256


@pytest.mark.parametrize("name", BITS)
def test_bytes_of_the_compiled_step(use_mesh, name):
    with use_mesh():
        shallow, _ = compiled(name, 4)
        deep, count = compiled(name, 8)
    held, counters = (8 + BYTES[BITS[name]]) * count, 2 * 4  # and the parameters and gradients
    assert deep.argument_size_in_bytes == held + counters
    assert deep.alias_size_in_bytes == held - 4 * count + counters  # updated in place
    # What is in float32 beside them is of one layer, whatever their number.
    more = deep.temp_size_in_bytes - shallow.temp_size_in_bytes
    assert more < 0.1 * deep.temp_size_in_bytes
