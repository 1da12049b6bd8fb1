"""Parts that do nothing are removed without a trace, and operations fall as is counted."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from compress.importance import magnitude_scores
from compress.shrink import Sizes, shrink, smaller
from models.flops import flops_per_token
from parallel.zero import for_model
from tests.small import CAUSAL_LM, DECODER, MIXTURE, all_count, initial_params, layout
from training.naming import named, nested

BLOCKS = "stack/blocks/"
# Two groups of key and value heads of three query heads each; layers in one piece.
CONFIG = replace(DECODER, embed_dim=256, heads=6, dropout=0.0, unroll=4, layers=4)
EIGHT = replace(CONFIG, heads=8)
ROWS, T = 2, 16


def loss_of(config, params):
    """The loss on one device, and what XLA counts of operations in it."""
    with layout(config=config, rows=ROWS) as laid:
        model = laid.model

        def loss(params, batch):
            leaves, build = for_model(params, model.axes, model.rules, "float32")
            weights = all_count((ROWS, T), out_sharding=model.rules.spec("batch seq"))
            return model.loss(build(leaves), batch, weights, None)[0]

        inputs = laid.params(params), laid.batch(rows=ROWS)
        compiled = jax.jit(loss).lower(*inputs).compile()
        return float(compiled(*inputs)), compiled.cost_analysis()["flops"]


def axes_of(config):
    with layout(config=config, rows=ROWS) as laid:
        return laid.model.axes


def params_of(config, dead=None):
    """Drawn parameters, some of their rows zero: name -> an index of the array."""
    arrays = {name: np.array(a) for name, a in named(initial_params(config, CAUSAL_LM)).items()}
    for name, index in dead or []:
        arrays[BLOCKS + name][index] = 0
    return nested(arrays)


def shrunk(config, params, sizes, parts=1):
    return shrink(
        config, params, axes_of(config), sizes, magnitude_scores(config, params), parts=parts
    )


CHANNELS = [("mlp/down", (layer, slice(layer, None, 2 + layer % 2))) for layer in range(4)]
HEADS = [("attention/out", (layer, [layer % 3, 3 + (layer + 1) % 3])) for layer in range(4)]
GROUPS = [
    ("attention/out", (layer, slice(3 * (layer % 2), 3 * (layer % 2) + 3))) for layer in range(4)
]
LAYERS = [(n, i) for n in ("attention/out", "mlp/down") for i in (0, 2)]
LAYERS += [(n, i) for n in ("attention/out_bias", "mlp/down_bias") for i in (0, 2)]
CASES = {  # what is zero, the sizes without it
    "channels": (CHANNELS, Sizes(mlp_dim=44)),
    "heads of each group": (HEADS, Sizes(heads=4)),
    "groups": (GROUPS, Sizes(kv_heads=1)),
    "layers": (LAYERS, Sizes(layers=2)),
    "all": (CHANNELS + HEADS + LAYERS, Sizes(heads=4, mlp_dim=44, layers=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_what_does_nothing_is_removed_without_a_trace(name):
    dead, sizes = CASES[name]
    params = params_of(CONFIG, dead)
    small, less = shrunk(CONFIG, params, sizes)
    want, before = loss_of(CONFIG, params)
    got, after = loss_of(small, less)  # its shapes are those of the smaller model, or this fails
    # Zeros are left out of float32 sums, whose other terms may then be added in another order.
    assert got == pytest.approx(want, rel=2e-6)
    # The forward pass has a third of the operations counted for a step. What is counted beside
    # matrix products (nonlinearities, norms, rotations) and keys that are hidden, which this form
    # of attention computes, is some per cent of them.
    counted = (flops_per_token(CONFIG, T) - flops_per_token(small, T)) * ROWS * T / 3
    assert before - after == pytest.approx(counted, rel=0.1)


def test_experts_lose_channels_of_their_own():
    dead = [("mlp/down", (slice(None), e, slice(e % 3, None, 3))) for e in range(8)]
    params = params_of(MIXTURE, dead)
    small, less = shrunk(MIXTURE, params, Sizes(mlp_dim=32))
    assert small.experts.mlp_dim == 32
    down, old = (named(p)[BLOCKS + "mlp/down"] for p in (less, params))
    assert down.shape == (3, 8, 32, 32)
    for e in range(8):
        kept = [f for f in range(48) if f % 3 != e % 3]
        np.testing.assert_array_equal(down[:, e], old[:, e, kept])


def test_periods_of_kinds_are_removed_whole():
    config = replace(DECODER, layers=5, pattern=("local", "global"), window=4)
    params = params_of(config)
    scores = replace(magnitude_scores(config, params), layers=np.array([1.0, 9, 2, 3, 0]))
    small, less = shrink(config, params, axes_of(config), Sizes(layers=3), scores)
    gain = BLOCKS + "attention/query"
    assert small.layers == 3
    np.testing.assert_array_equal(named(less)[gain], named(params)[gain][[0, 1, 4]])


def test_scores_of_others_choose_and_ties_go_to_the_first():
    params = params_of(CONFIG)
    scores = magnitude_scores(CONFIG, params)
    scores = replace(scores, channels=np.tile(np.arange(64.0) // 2, (4, 1)))
    _, less = shrink(CONFIG, params, axes_of(CONFIG), Sizes(mlp_dim=3), scores)
    up = BLOCKS + "mlp/up"
    np.testing.assert_array_equal(named(less)[up], named(params)[up][:, :, [60, 62, 63]])


@pytest.mark.parametrize(
    ("config", "sizes", "parts", "message"),
    [
        (
            CONFIG,
            Sizes(heads=3),
            1,
            "--heads=3: with 2 key and value heads every one of those serves",
        ),
        (CONFIG, Sizes(heads=4, kv_heads=1), 1, "choose heads of [1, 2, 3], or fewer --kv_heads"),
        (EIGHT, Sizes(mlp_dim=30), 4, "--mlp_dim=30: does not divide by the 4 parts of the tensor"),
        (EIGHT, Sizes(mlp_dim=30), 4, "choose 28 or 32"),
        (CONFIG, Sizes(heads=2), 4, "--heads=2: does not divide by the 4 parts of the tensor axis"),
        (CONFIG, Sizes(layers=5), 1, "--layers=5: the model has 4; choose 1 to 4"),
        (replace(CONFIG, distinct=2), Sizes(layers=2), 1, "layers share blocks"),
        (
            replace(CONFIG, pattern=("local", "global"), window=4),
            Sizes(layers=3),
            1,
            "whole periods are removed; choose one of [2]",
        ),
        (replace(CONFIG, positions="relative"), Sizes(heads=4), 1, "leave heads out"),
    ],
)
def test_sizes_that_cannot_be_say_which_can(config, sizes, parts, message):
    with pytest.raises(ValueError) as error:
        smaller(config, sizes, parts)
    assert message in str(error.value)
