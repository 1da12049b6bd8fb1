"""What layers, embedding and head cost, and how the layers of a pipeline are divided by it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from models.beside import encoder_beside
from models.config import ModelConfig
from models.flops import flops_by_layer, head_flops
from models.part_costs import part_costs
from parallel.division import divide
from parallel.remat import RematConfig
from tests.families import FAMILIES
from tests.small import DECODER

EXACT = 1e-12  # of float64
LLAMA = ModelConfig(
    vocab_size=128256, layers=32, embed_dim=4096, mlp_dim=14336, heads=32, kv_heads=8, head_dim=128
)
T = 16


def policy(name: str, *save: str) -> RematConfig:
    return RematConfig(policy=name, save=save)


def ratio(config: ModelConfig, remat: RematConfig) -> float:
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
        assert costs.last == head_flops(LLAMA, 8192)
        assert 0.01 < costs.first / costs.layer[0] < 0.03


def test_with_full_the_head_weighs_fewer_layers():
    def last(name: str) -> int:
        return divide(32, 4, costs=part_costs(LLAMA, 512, policy(name))).layers[-1]

    assert (last("none"), last("full")) == (6, 7)


def test_the_first_stage_has_the_encoder():
    """Forward, and forward and backward once more where its gradient is taken."""
    config = FAMILIES["t5"].config
    plain = replace(config, family="decoder", cross="none", encoder_layers=0, source_tied=True)
    source = 3 * T
    costs, without = (part_costs(c, T, policy("none"), source) for c in (config, plain))
    encoder = sum(flops_by_layer(encoder_beside(config), source)) * source / T
    assert costs.first == pytest.approx(without.first + encoder * 4 / 3, rel=EXACT)
    assert costs.layer == flops_by_layer(config, T, source)
    assert costs.layer[0] > without.layer[0]
