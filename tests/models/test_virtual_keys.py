"""Virtual keys before every row: every form of attention, and a model with documents."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.masks import Mask, MaskArrays
from models.virtual_keys import VirtualKeys
from parallel.precision import PrecisionConfig
from tests.attention import (
    FORMS,
    SEGMENTS,
    B,
    T,
    assert_near,
    inputs,
    reference,
    rules_for,
    with_gradients,
)
from tests.small import DECODER, initial_params, layout, numpy_batch
from training.step import loss_and_grads

P = 5  # does not divide by a block


def seen_by(mask):
    """[B, T, P + T] by words: virtual keys by all but padding, the others as without them."""
    seen = np.zeros((B, T, P + T), bool)
    for b in range(B):
        for q in range(T):
            document = SEGMENTS[b, q] if mask.segments else 1
            seen[b, q, :P] = document > 0
            for k in range(q + 1):
                near = mask.window is None or q - k < mask.window
                same = not mask.segments or SEGMENTS[b, k] == document > 0
                seen[b, q, P + k] = near and same
    return seen


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "mask", [Mask(), Mask(segments=True), Mask(window=6, segments=True)], ids=str
)
def test_every_form_sees_them(use_mesh, form, mask):
    data = inputs(k_length=P + T, kv_heads=2)
    with use_mesh():
        keys = VirtualKeys(*(jnp.asarray(x[:, :P]) for x in data[1:3]))
        segments = jnp.asarray(SEGMENTS) if mask.segments else None
        joined, arrays, _ = keys.mask(mask, MaskArrays(segments, segments), None)
        run = with_gradients(joined, rules_for(kv_heads=2), implementation=form, block=8)
        # float32 rounds at 6e-8; sums of at most 25 terms of either sign
        assert_near(run(*data, arrays), reference(*data, seen_by(mask)), 1e-6)


def test_documents_of_a_row_know_nothing_of_each_other():
    """A row of two documents and a row of each: the same losses with virtual keys, too."""
    config = replace(DECODER, layers=2, dropout=0.0, prefix_length=3)
    batch = numpy_batch(rows=1)
    first = batch["segments"][0] == 1
    alone = {n: np.zeros((2, a.shape[1]), a.dtype) for n, a in batch.items()}
    for row, chosen in enumerate((first, batch["segments"][0] == 2)):
        for name, array in batch.items():
            alone[name][row, : chosen.sum()] = array[0, chosen]
    with layout(config=config, rows=2) as laid:
        params = laid.params(initial_params(config))
        loss = jax.jit(loss_and_grads(laid.model, PrecisionConfig()))
        found = [
            float(loss(params, laid.placed(b), None, jnp.float32(1))[0]["loss"])
            for b in (batch, alone)
        ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)  # float32 sums in another order
