"""What layers, embedding and head cost, and how the layers of a pipeline are divided by it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from models.config import DecoderConfig
from models.flops import flops_by_layer, head_flops
from models.part_costs import part_costs
from parallel.division import divide
from parallel.remat import RematConfig
from tests.small import DECODER

EXACT = 1e-12  # of float64
LLAMA = DecoderConfig(
    vocab_size=128256, layers=32, embed_dim=4096, mlp_dim=14336, heads=32, kv_heads=8, head_dim=128
)
T = 16


def policy(name: str, *save: str) -> RematConfig:
    return RematConfig(policy=name, save=save)


def ratio(config: DecoderConfig, remat: RematConfig) -> float:
    """A layer's cost, of its forward and backward alone."""
    return part_costs(config, T, remat).layer[0] / flops_by_layer(config, T)[0]


def test_a_layer_costs_what_it_computes_again_too():
    assert ratio(DECODER, policy("none")) == 1.0
    # All of the forward pass but its last product, which no gradient reads.
    last = 2 * 32 * 64 / flops_by_layer(DECODER, T)[0]
    assert ratio(DECODER, policy("full")) == pytest.approx(4 / 3 - last, rel=EXACT)
    assert ratio(DECODER, policy("dots")) == 1.0
    # Scores and weighted sums forward, of 12 N H for each key that a query sees on average.
    core = 4 * 8 * 8 * (T + 1) / 2
    attention = 1 + core / flops_by_layer(DECODER, T)[0]
    assert ratio(DECODER, policy("attention")) == pytest.approx(attention, rel=EXACT)


def test_a_product_that_is_not_saved_is_computed_again():
    names = ["query", "key", "value", "attention_out", "attention_projection", "mlp_up"]
    without = ratio(DECODER, policy("custom", *names))
    gate = 2 * 32 * 64 / flops_by_layer(DECODER, T)[0]
    assert without == pytest.approx(1 + gate, rel=EXACT)
    ungated = replace(DECODER, gated=False)
    assert ratio(ungated, policy("custom", *names)) == 1.0


def test_the_embedding_is_small_and_the_head_is_its_products():
    for remat in (policy("none"), policy("full")):
        costs = part_costs(LLAMA, 8192, remat)
        assert costs.last == head_flops(LLAMA)
        assert 0.01 < costs.first / costs.layer[0] < 0.03


def test_with_full_the_head_weighs_fewer_layers():
    def last(name: str) -> int:
        return divide(32, 4, costs=part_costs(LLAMA, 512, policy(name))).layers[-1]

    assert (last("none"), last("full")) == (6, 7)
