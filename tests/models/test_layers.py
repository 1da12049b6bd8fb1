"""Norms, nonlinearities, dropout and initial weights against their definitions."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from models.layers import (
    ACTIVATIONS,
    Norm,
    broadcast_to_rank,
    constant,
    dropout,
    gathered,
    normal,
    residual_std,
    weight,
)
from parallel.mesh import MeshConfig
from parallel.rules import ParallelConfig, make_rules

D = 16


def rules_for(zero=3, **sizes):
    return make_rules(ParallelConfig(zero=zero), MeshConfig(**({"data": 1} | sizes)).sizes(), {})


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_is_its_definition(use_mesh, kind, plus_one):
    rng = np.random.default_rng(0)
    x = 1e-2 * rng.normal(size=(2, 3, D)) + 1e-2  # so small that eps is seen
    gain, bias = rng.normal(size=D), rng.normal(size=D)
    with use_mesh():
        norm = Norm(D, rules_for(), nnx.Rngs(0), kind=kind, eps=1e-4, plus_one=plus_one)
        fresh = norm(jnp.asarray(x, jnp.float32))
        norm.gain.set_value(jnp.asarray(gain, jnp.float32))
        if norm.bias is not None:
            norm.bias.set_value(jnp.asarray(bias, jnp.float32))
        got = norm(jnp.asarray(x, jnp.float32))
        short = norm(jnp.asarray(x, jnp.bfloat16))
    centred = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    plain = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-4)
    want = plain * (gain + 1 if plus_one else gain) + (bias if kind == "layer" else 0)
    np.testing.assert_allclose(fresh, plain, rtol=1e-5, atol=1e-6)  # the identity at first
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)  # float32 rounds at 6e-8
    assert short.dtype == jnp.bfloat16
    # x and the result are rounded once each at 4e-3; nothing in between
    np.testing.assert_allclose(np.asarray(short, np.float64), want, rtol=0, atol=0.05)


def test_norms_of_bfloat16_are_computed_in_float32(use_mesh):
    """256 ones and a small spread: in bfloat16 their mean of squares would be off by a percent."""
    x = jnp.asarray(1 + np.arange(256) % 7 / 128, jnp.bfloat16)[None, None]
    with use_mesh():
        norm = Norm(256, rules_for(), nnx.Rngs(0), kind="layer")
        got = np.asarray(norm(x), np.float64)
    y = np.asarray(x, np.float64)
    want = (y - y.mean()) / y.std()
    np.testing.assert_allclose(got, want, rtol=0, atol=np.abs(want).max() * 2**-7)  # one rounding


def test_nonlinearities(use_mesh):
    x = np.linspace(-4, 4, 81)
    erf = np.array([math.erf(v / math.sqrt(2)) for v in x])
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    want = {
        "gelu": x * (1 + erf) / 2,
        "gelu_tanh": x * (1 + np.tanh(inner)) / 2,
        "silu": x / (1 + np.exp(-x)),
        "relu": np.maximum(x, 0),
    }
    assert set(want) == set(ACTIVATIONS)
    assert np.abs(want["gelu"] - want["gelu_tanh"]).max() > 1e-4  # the test can tell them apart
    with use_mesh():
        for name, function in ACTIVATIONS.items():
            got = function(jnp.asarray(x, jnp.float32))
            np.testing.assert_allclose(got, want[name], rtol=1e-5, atol=1e-6)


def test_dropout_drops_its_share_scales_the_rest_and_is_one_mask_on_every_mesh(use_mesh):
    names, rate = "batch residual_seq act_embed", 0.25
    masks = []
    for sizes in ({}, {"data": 2, "fsdp": 4}, {"tensor": 8}):
        rules = make_rules(
            ParallelConfig(sequence=True), MeshConfig(**({"data": 1} | sizes)).sizes(), {}
        )
        with use_mesh(**sizes):
            x = jax.device_put(np.full((8, 16, 32), 3.0, np.float32), rules.spec(names))
            y = dropout(x, rate, jax.random.key(0), rules, names)
            assert jax.typeof(y) == jax.typeof(x)
            assert dropout(x, rate, None, rules, names) is x
            assert dropout(x, 0.0, jax.random.key(0), rules, names) is x
            masks.append(np.asarray(y))
    assert set(np.unique(masks[0])) == {np.float32(0), np.float32(4)}
    assert abs((masks[0] == 0).mean() - rate) < 0.03  # 4096 draws: a standard deviation of 0.007
    for other in masks[1:]:
        np.testing.assert_array_equal(other, masks[0])


def test_weights_are_laid_out_at_rest_and_the_same_on_every_mesh(use_mesh):
    values = []
    for sizes in ({}, {"fsdp": 4, "tensor": 2}):
        with use_mesh(**sizes):
            rules = rules_for(**sizes)
            init = lambda rngs, rules=rules: weight(
                rngs, (D, 4, 8), "embed -> heads head_dim", rules, normal(0.5)
            ).get_value()
            value = jax.jit(lambda init=init: init(nnx.Rngs(params=3)))()
            parts = math.prod(sizes.values())
            assert {s.data.size for s in value.addressable_shards} == {D * 4 * 8 // parts}
            if sizes:
                assert jax.typeof(value).sharding.spec == P("fsdp", "tensor", None)
            values.append(np.asarray(value))
    np.testing.assert_array_equal(*values)
    assert abs(values[0].std() - 0.5) < 0.05  # 512 draws: a standard deviation of 0.016
    assert abs(values[0].mean()) < 0.07


def test_gathered_is_whole_over_fsdp(use_mesh):
    with use_mesh(fsdp=4, tensor=2):
        rules = rules_for(fsdp=4, tensor=2)
        param = weight(nnx.Rngs(0), (8, D), "vocab -> embed", rules, normal(1.0))
        at_rest = param.get_value()
        assert {s.data.shape for s in at_rest.addressable_shards} == {(4, D // 4)}
        whole = gathered(param, rules)
        assert {s.data.shape for s in whole.addressable_shards} == {(4, D)}
        np.testing.assert_array_equal(whole, at_rest)


def test_small_parts(use_mesh):
    with use_mesh():
        assert broadcast_to_rank(jnp.ones(3), 3).shape == (1, 1, 3)
        assert np.all(constant(2.5)(None, (2, 2), jnp.float32, None) == 2.5)
    # 24 projections of 12 layers: the stream's variance stays that of one weight matrix
    assert residual_std(0.02, 12) == pytest.approx(0.02 / math.sqrt(24))
