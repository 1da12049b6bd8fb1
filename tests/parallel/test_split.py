"""A layer in parts gives the gradients of `jax.vjp`, and no part repeats another's products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel.mesh import MeshConfig, make_mesh
from parallel.split import Split

ROWS, WIDTH, HIDDEN = 4, 8, 16
KEY = jax.random.key(0)


def layer(weights, others, x, number, index):
    """A gated feed-forward with a norm, dropout by layer and micro-batch, and one frozen weight."""
    gain, gate, up, down = weights
    key = jax.random.fold_in(jax.random.fold_in(KEY, index), number)
    h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * gain[None]
    h = jax.nn.silu(h @ gate) * (h @ up) + h @ others[0]
    keep = jax.random.bernoulli(key, 0.5, h.shape)
    return x + jnp.where(keep, h, 0) @ down


def rematerialised(weights, others, x, number, index):
    return jax.checkpoint(lambda w, x: layer(w, others, x, number, index))(weights, x)


@pytest.fixture(params=[layer, rematerialised])
def case(request):
    """(function, weights, others, x, dy, Split), under a mesh as the executor's traces are."""
    keys = iter(jax.random.split(jax.random.key(1), 8))

    def draw(*shape):
        return jax.random.normal(next(keys), shape) * shape[0] ** -0.5

    with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
        weights = [draw(WIDTH), draw(WIDTH, HIDDEN), draw(WIDTH, HIDDEN), draw(HIDDEN, WIDTH)]
        others, x, dy = [draw(WIDTH, HIDDEN)], draw(ROWS, WIDTH), draw(ROWS, WIDTH)
        yield request.param, weights, others, x, dy, Split(request.param, weights, others, x)


def products(part) -> int:
    return sum(eqn.primitive.name == "dot_general" for eqn in part.eqns)


def assert_close(got, want):
    # The same products in the same order; XLA fuses the elementwise parts in other ways.
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("apart", [False, True])
def test_gradients(case, apart):
    function, weights, others, x, dy, split = case
    number, index = jnp.int32(3), jnp.int32(2)
    want, back = jax.vjp(lambda w, x: function(w, others, x, number, index), weights, x)
    shared, both = split.at(index), [*weights, *others]
    y, kept = split.forward(shared, both, number, x)
    assert [(a.shape, a.dtype) for a in kept] == [(s.shape, s.dtype) for s in split.kept]
    if apart:
        dx, pending = split.input_grad(shared, both, number, kept, dy)
        gradients = split.weight_grad(shared, both, number, kept, pending)
    else:
        dx, gradients = split.backward(shared, both, number, kept, dy)
    assert_close((y, (gradients, dx)), (want, back(dy)))


def test_what_is_kept(case):
    function, *_, split = case
    rows = sum(s.shape[-1] for s in split.kept)
    if function is rematerialised:
        assert rows == WIDTH  # x
    else:  # x, its mean square (or the root), gate and up, and what the frozen weight makes
        assert rows == WIDTH + 1 + 3 * HIDDEN
    # The cotangents of gate and up (by way of that of their product) and of y; never of a weight.
    assert all(s.shape[0] == ROWS for s in split.pending)


def test_no_product_twice(case):
    function, *_, split = case
    # With rematerialisation the policy's own: gate, up, and for down's gradient the frozen one.
    two, three = (0, 0) if function is layer else (2, 3)
    assert products(split._forward) == 4
    assert products(split._input_grad) == 4 + two
    assert products(split._weight_grad) == 3 + three
    assert products(split._backward) == 7 + three
