"""From master parameters to the model's copy and back: layouts and dtypes at every ZeRO level."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel.mesh import MeshConfig
from parallel.rules import ParallelConfig, make_rules
from parallel.twin import Twin, joined, whole
from parallel.zero import for_model, zeros_like_gradients

SIZES = {"fsdp": 4, "tensor": 2}
SHAPES = {"up": (16, 8), "bias": (8,), "gain": (16,)}
AXES = {"up": "embed -> mlp", "bias": "mlp", "gain": "norm"}


def drawn():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def specs(tree):
    return {name: jax.typeof(array).sharding.spec for name, array in tree.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_copies_and_gradients_are_laid_out_and_equal(use_mesh, zero, dtype):
    rules = make_rules(ParallelConfig(zero=zero), MeshConfig(data=1, **SIZES).sizes(), {})
    initial = drawn()
    at = lambda where: {name: where(AXES[name], SHAPES[name]) for name in SHAPES}
    with use_mesh(**SIZES):
        params = {n: jax.device_put(a, at(rules.at_rest)[n]) for n, a in initial.items()}
        seen = {}

        @jax.jit
        def run(params):
            leaves, build = for_model(params, AXES, rules, dtype)

            def loss(leaves):
                weights = {name: joined(w) for name, w in build(leaves).items()}
                seen.update(specs(weights))
                used = {n: whole(w, rules.gathered(AXES[n], SHAPES[n])) for n, w in weights.items()}
                return sum(jnp.sum(jnp.sin(w)) for w in used.values()).astype(jnp.float32)

            return jax.grad(loss)(leaves)

        grads = run(params)
        assert seen == at(rules.in_model)
        assert specs(grads) == at(rules.of_gradient)
        buffer = jax.jit(lambda p: zeros_like_gradients(p, AXES, rules, "float32"))(params)
        assert specs(buffer) == at(rules.of_gradient)
    for name, gradient in grads.items():
        assert gradient.dtype == jnp.dtype(dtype)
        want = np.cos(np.asarray(jnp.asarray(initial[name], dtype), np.float64))
        # float32, or one rounding of bfloat16 each by the sine's derivative and the product
        tolerance = 1e-6 if dtype == "float32" else 2**-7
        np.testing.assert_allclose(np.asarray(gradient, np.float64), want, rtol=0, atol=tolerance)


def test_the_halves_of_a_twin(use_mesh):
    """`whole` is computed with, `part` gets the gradient."""
    with use_mesh():
        twin = Twin(jnp.full(3, 2.0), jnp.full(3, 5.0))
        value = lambda whole, part: jnp.sum(joined(Twin(whole, part)) ** 3)
        np.testing.assert_allclose(value(*twin), 24.0)
        to_whole, to_part = jax.grad(value, (0, 1))(*twin)
        np.testing.assert_array_equal(to_whole, np.zeros(3))
        np.testing.assert_allclose(to_part, np.full(3, 12.0))
        array = jnp.ones(2)
        assert joined(array) is array
