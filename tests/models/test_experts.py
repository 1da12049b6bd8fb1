"""Experts against a loop over all of them, router losses against NumPy, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.experts import Experts
from models.experts_config import ExpertsConfig
from models.layers import ACTIVATIONS
from models.router import router_losses, with_gradient
from parallel.dispatch import FREE, fill_slots, sort_rows
from parallel.grouped import block_size, outer_product, product
from parallel.mesh import MeshConfig, make_mesh
from parallel.rules import ParallelConfig, make_rules
from tests.small import MIXTURE, B, T

TOLERANCE = 1e-5  # float32 sums in another order


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
        yield


def rules_of(config):
    dims = config.dims() | {"batch": (B, "batch"), "residual_seq": (T, "length")}
    return make_rules(ParallelConfig(), MeshConfig(data=1).sizes(), dims)


def dense_loop(config, weights, x_BTD, segments_BT):
    """Every expert on every token; tokens take what they chose."""
    experts = config.experts
    probs = jax.nn.softmax(x_BTD @ weights["router"]["router"])
    top, choice = jax.lax.top_k(probs, experts.per_token)
    if experts.normalise:
        top = top / top.sum(-1, keepdims=True)
    total = jnp.zeros_like(x_BTD)
    for e in range(experts.number):
        h = x_BTD @ weights["up"][e]
        act = ACTIVATIONS[config.activation]
        h = act(x_BTD @ weights["gate"][e]) * h if config.gated else act(h)
        share = jnp.where(choice == e, top, 0).sum(-1, keepdims=True)
        total += share * (h @ weights["down"][e])
    return jnp.where((segments_BT > 0)[..., None], total, 0)


def value_and_gradients(function, weights, x_BTD):
    direction = np.random.default_rng(5).normal(size=x_BTD.shape).astype(np.float32)
    loss = lambda weights, x: jnp.sum(function(weights, x) * direction)
    return jax.jit(lambda *a: (function(*a), *jax.grad(loss, (0, 1))(*a)))(weights, x_BTD)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "not"])
@pytest.mark.parametrize("capacity", [0.0, 8.0], ids=["sorted", "slots"])
def test_equal_to_a_loop_over_experts(capacity, normalise, gated):
    """With room for all tokens in one expert, the form with slots drops none."""
    experts = replace(MIXTURE.experts, capacity=capacity, normalise=normalise)
    config = replace(MIXTURE, experts=experts, gated=gated)
    rules = rules_of(config)
    graph, state = nnx.split(Experts(config, rules, nnx.Rngs(params=0)))
    weights = nnx.to_pure_dict(state)
    x_BTD = jax.random.normal(jax.random.key(1), (B, T, config.embed_dim))
    segments_BT = jnp.ones((B, T), jnp.int32).at[0, 10:].set(0)  # padding goes nowhere

    got = value_and_gradients(
        lambda w, x: nnx.merge(graph, w)(x, segments_BT, None)[0], weights, x_BTD
    )
    want = value_and_gradients(lambda w, x: dense_loop(config, w, x, segments_BT), weights, x_BTD)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(g - w) <= TOLERANCE * np.linalg.norm(w)
        assert np.linalg.norm(w) > 0


@pytest.mark.parametrize("sizes", [[40, 0, 3, 21], [0, 0, 0, 0], [64, 0, 0, 0], [1, 1, 1, 61]])
def test_blocks_give_each_row_its_experts_product(sizes):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(64, 6)), rng.normal(size=(64, 5))
    w = rng.normal(size=(4, 6, 5))
    owner = np.repeat(np.arange(5), [*sizes, 64 - sum(sizes)])
    x, dy, w = (a.astype(np.float32) for a in (x, dy, w))
    padded = np.concatenate([w, np.zeros_like(w[:1])])
    got = jax.jit(lambda *a: product(*a, transposed=False))(x, w, jnp.int32(sizes))
    np.testing.assert_allclose(got, np.einsum("rx,rxy->ry", x, padded[owner]), atol=1e-5)
    got = jax.jit(lambda *a: product(*a, transposed=True))(dy, w, jnp.int32(sizes))
    np.testing.assert_allclose(got, np.einsum("ry,rxy->rx", dy, padded[owner]), atol=1e-5)
    want = np.stack([x[owner == e].T @ dy[owner == e] for e in range(4)])
    np.testing.assert_allclose(jax.jit(outer_product)(x, dy, jnp.int32(sizes)), want, atol=1e-5)


def test_block_sizes():
    assert block_size(5, 8) == 5  # all rows there are
    assert block_size(64, 4) == 8
    assert block_size(8192, 8) == 128
    assert block_size(10**6, 8) == 512


def test_rows_are_sorted_by_expert():
    choice = jnp.int32([[[2, 0], [1, 2], [4, 4], [0, 1]]])  # of 4; the third token is padding
    index, sizes = sort_rows(choice, 4, rules_of(MIXTURE))
    np.testing.assert_array_equal(sizes, [[2, 2, 2, 0]])
    np.testing.assert_array_equal(index, [[1, 6, 2, 7, 0, 3, FREE, FREE]])


def test_first_choices_and_earlier_tokens_have_the_slots():
    choice = jnp.int32([[[0, 1], [0, 1], [0, 2], [1, 0]], [[3, 0], [0, 3], [4, 4], [4, 4]]])
    index = fill_slots(choice, 4, 2, rules_of(MIXTURE))
    free = [FREE, FREE]
    np.testing.assert_array_equal(index[0], [[0, 2], [6, 1], [5, FREE], free])
    np.testing.assert_array_equal(index[1], [[10, 9], free, free, [8, 11]])


def numpy_losses(logits, choice, weights, E):
    logits = logits.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    lse = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    probs, total = np.exp(logits - lse[..., None]), weights.sum()
    f = [(weights[..., None] * (choice == e)).sum() / total for e in range(E)]
    P = [(weights * probs[..., e]).sum() / total for e in range(E)]
    return E * sum(a * b for a, b in zip(f, P, strict=True)), (weights * lse**2).sum() / total


def test_router_losses_are_those_of_the_papers():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(3, 7, 5)).astype(np.float32)
    choice = np.argsort(-logits, -1)[..., :2].astype(np.int32)
    weights = (rng.random((3, 7)) < 0.7).astype(np.float32) / 4  # some tokens do not count
    balance, z = numpy_losses(logits, choice, weights, 5)
    loss, sums = router_losses(*map(jnp.asarray, (logits, choice, weights)), 0.3, 0.2)
    total = weights.sum()
    np.testing.assert_allclose(sums["balance_sum"], balance * total, rtol=1e-5)
    np.testing.assert_allclose(sums["router_z_sum"], z * total, rtol=1e-5)
    np.testing.assert_allclose(loss, (0.3 * balance + 0.2 * z) * total, rtol=1e-5)


def test_even_routing_has_a_balance_of_k():
    logits, weights = jnp.zeros((1, 4, 4)), jnp.ones((1, 4))
    choice = jnp.int32([[[0, 1], [1, 2], [2, 3], [3, 0]]])
    _, sums = router_losses(logits, choice, weights, 1.0, 0.0)
    np.testing.assert_allclose(sums["balance_sum"] / 4, 2.0, rtol=1e-6)


def test_a_loss_comes_in_by_its_gradient_alone():
    square = lambda x: jnp.sum(with_gradient(x, 3.0 * x * x))
    assert square(jnp.float32(5)) == 5
    assert jax.grad(square)(jnp.float32(5)) == 1 + 6 * 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(number=1), "config.experts.number = 1: 2 or more, or 0 for a dense feed-forward"),
        (
            dict(number=4, per_token=5),
            "config.experts.per_token = 5: from 1 to config.experts.number = 4",
        ),
        (dict(capacity=-1.0), "config.experts.capacity = -1.0: 0 (off) or more"),
    ],
)
def test_wrong_values_are_refused(values, message):
    with pytest.raises(ValueError) as error:
        ExpertsConfig(**values)
    assert str(error.value) == message


def test_biases_are_refused():
    with pytest.raises(ValueError) as error:
        replace(MIXTURE, mlp_bias=True)
    assert str(error.value) == (
        "config.model.mlp_bias = True: experts have no biases; set it to False"
    )


def test_what_has_no_effect_is_said():
    assert not ExpertsConfig().without_effect()
    assert not ExpertsConfig(number=4, z_loss=0.1).without_effect()
    assert ExpertsConfig(capacity=1.0).without_effect() == [
        "config.experts.capacity has no effect: config.experts.number is 0"
    ]
