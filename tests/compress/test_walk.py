"""A walk runs the layers as the model does, and sums what goes into their matrices."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.walk import walk
from compress.watch import edges
from tests.compress.walked import PLAIN, walked
from tests.small import MIXTURE

LOCAL = replace(PLAIN, layers=4, pattern=("local", "global"), window=4)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [(PLAIN, dict()), (PLAIN, dict(fsdp=2, tensor=4)), (LOCAL, dict(tensor=2))],
    ids=["one", "sharded", "pattern"],
)
def test_the_moment_of_the_first_layer_is_that_of_its_inputs(config, sizes):
    seen = []
    with walked(config, **sizes) as it:
        walk(it.text, it.params, lambda layer: seen.append(layer) or {})
        counted = np.concatenate([np.asarray(b["segments"]) > 0 for b in it.text.batches])
        table = np.asarray(it.params["embedding"])
        x = np.concatenate([table[np.asarray(b["tokens"])] for b in it.text.batches])
    assert [layer.number for layer in seen] == list(range(config.layers))
    h = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_eps)
    h = h * np.asarray(seen[0].weights["stack/blocks/attention_norm/gain"])
    h = h[counted]
    for name in ("query", "key", "value"):
        inputs = seen[0].inputs[f"stack/blocks/attention/{name}"]
        np.testing.assert_allclose(inputs.moment, h.T @ h, rtol=2e-4, atol=2e-3)
        np.testing.assert_allclose(inputs.sizes, np.abs(h).sum(0), rtol=1e-4)
        np.testing.assert_allclose(inputs.largest, np.abs(h).max(0), rtol=1e-5)
        assert inputs.tokens == counted.sum()
        assert inputs.histogram.sum() == h.shape[1] * counted.size  # padding counts as zeros
        low, high = edges()[:-1], edges()[1:]
        top = np.flatnonzero(inputs.histogram)[-1]
        assert low[top] <= np.abs(h).max() * 1.001
        assert np.abs(h).max() <= high[top] * 1.001
    assert set(seen[0].inputs) == {
        f"stack/blocks/{name}"
        for name in (
            *("attention/query", "attention/key", "attention/value", "attention/out"),
            *("mlp/up", "mlp/gate", "mlp/down"),
        )
    }


def test_the_next_layer_sees_what_a_visitor_left():
    def without_branches(layer):
        names = ("attention/out", "mlp/down", "attention/out_bias", "mlp/down_bias")
        return {
            f"stack/blocks/{n}": jnp.zeros_like(layer.weights[f"stack/blocks/{n}"]) for n in names
        }

    seen = []

    def visit(layer):
        seen.append(layer.inputs["stack/blocks/attention/query"].sizes)
        return without_branches(layer)

    with walked() as it:
        walk(it.text, it.params, visit)
    # The residual stream stays the embedding: every layer's norm, whose gains are 1, gives the same
    np.testing.assert_allclose(seen[1], seen[0], rtol=1e-5)
    np.testing.assert_allclose(seen[2], seen[0], rtol=1e-5)


def test_experts_are_refused():
    from compress.walk import check_walk

    with walked(replace(MIXTURE, dropout=0.0)) as it, pytest.raises(ValueError) as error:
        check_walk(it.laid.model, "--method=gptq")
    assert str(error.value) == (
        "--method=gptq: calibrated on what goes into a matrix, which is not summed for experts "
        "(config.experts.number); choose a method without calibration"
    )
    assert jax.device_count() == 8
