"""Shared blocks, ranks and frozen weights: compiled bytes move as predicted, on the processor.

The model is that of `test_knobs`: 256 layers, so that what all of them keep is what counts.
"""

from __future__ import annotations

import pytest

from memory.predict import predict
from models.flops import flops_per_token
from parallel.footprint import ITEM
from parallel.targets import parse_target
from tests.memory.test_knobs import (
    CLOSE,
    FULL,
    ROWS,
    XLA,
    T,
    arguments_moved,
    compiled,
    job,
    moved,
    predicted,
)

BLOCK = 4 * (64 * (4 + 2 + 2 + 4) * 32 + 3 * 64 * 128 + 4 * 64)  # bytes of a layer's weights


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["cycle", "repeat"])
def test_shared_blocks_move_weights_momentum_and_gradients_alone(sharing):
    """Of 256 blocks four are left; what is kept of activations is that of 256 layers."""
    own, shared = (XLA, FULL), (XLA, FULL, "model.distinct=4", f"model.sharing={sharing}")
    assert arguments_moved(own, shared) == -2 * 252 * BLOCK
    change, guess = moved(own, shared)
    assert guess == pytest.approx(-252 * BLOCK)
    assert change == pytest.approx(guess, rel=CLOSE)


@pytest.mark.slow
def test_a_rank_moves_the_table():
    """8064 rows of 64 become 8064 of 16 and a projection; weights and momentum."""
    base = (XLA, FULL, "model.vocab_size=8064", "model.tied=true")
    change = arguments_moved(base, (*base, "model.embed_rank=16"))
    assert change == -2 * 4 * (8064 * (64 - 16) - 16 * 64)


@pytest.mark.slow
def test_frozen_weights_have_no_gradients_and_no_moments():
    """Nor are the inputs of their products kept."""
    base, frozen = (XLA,), (XLA, "optimizer.frozen=stack/*/mlp/*")
    layer = 4 * 3 * 64 * 128
    assert arguments_moved(base, frozen) == -256 * layer
    change, guess = moved(base, frozen)
    inputs = 256 * 4 * ROWS * T * (64 + 128)
    assert guess == pytest.approx(-257 * layer - inputs)
    assert change == pytest.approx(guess, rel=CLOSE)


@pytest.mark.slow
def test_below_what_is_trained_nothing_is_kept():
    changes = (XLA, "optimizer.frozen=stack/*,embedding")
    there = compiled(*changes)
    assert there.temporaries < predicted(*changes).temporaries < compiled(XLA).temporaries / 20


def test_operations_are_those_of_all_layers_and_of_a_head_of_rank_r():
    own, shared = job(), job("model.distinct=4")
    assert flops_per_token(shared.model, 64) == flops_per_token(own.model, 64)
    ranked = job("model.embed_rank=16", "model.vocab_size=8064").model
    plain = job("model.vocab_size=8064").model
    less = flops_per_token(plain, 64) - flops_per_token(ranked, 64)
    assert less == 6 * (8064 * (64 - 16) - 2 * 16 * 64)  # in through the projection, and back


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_pipeline_has_shared_blocks_on_every_stage(zero):
    """Whole, as embedding and head: four stages of 64 layers have four blocks each."""
    keys = ("mesh.pipe=4", "pipeline.microbatches=8", "data.batch_size=64", f"parallel.zero={zero}")
    shared = ("model.distinct=4", *keys)
    chip = parse_target("cpu:8").chip
    given = {"mesh.fsdp=2": job(*shared, "mesh.fsdp=2", devices=8)}
    for made in given.values():
        parts = predict(made, chip).components
        weights = 4 * BLOCK + ITEM["float32"] * 64  # and the last gain
        tables = 2 * 4 * made.model.padded_vocab * 64
        divided = 2 if zero >= 1 else 1
        assert parts["weights (master copy)"] == (weights + tables // 4) // divided
