"""What may reach what in a decoder: documents, padding, the future, padded vocabulary, dropout."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import ModelConfig
from tests.drawn import decoder_of, drawn_params, put
from tests.small import DECODER, T, all_count, layout, numpy_batch

TINY = ModelConfig(
    vocab_size=100, layers=2, embed_dim=16, mlp_dim=16, heads=2, kv_heads=1, head_dim=8,
    attention="xla",
)  # fmt: skip
LOCAL = replace(TINY, window=3, pattern=("local",))


def features(laid, config):
    """A (params, batch, key) -> x_BTD."""
    build = decoder_of(laid, config)
    return jax.jit(lambda params, batch, key: build(params)(batch, key))


def test_packed_documents_are_as_each_in_its_own_row():
    packed = numpy_batch(rows=2)
    packed["tokens"] %= TINY.vocab_size
    alone = {name: np.zeros((2, T), int) for name in packed}
    first = packed["segments"] == 1
    cuts = first.sum(1)
    for row, cut in enumerate(cuts):
        stop = np.sum(packed["segments"][row] > 0)
        alone["tokens"][row, : stop - cut] = packed["tokens"][row, cut:stop]
        alone["positions"][row] = np.arange(T)
        alone["segments"][row, : stop - cut] = 1
    with layout(config=TINY, rows=2) as laid:
        run, params = features(laid, TINY), laid.params(drawn_params(laid, TINY))
        together = np.asarray(run(params, put(laid, packed), None))
        apart = np.asarray(run(params, put(laid, alone), None))
        for row, cut in enumerate(cuts):
            stop = np.sum(packed["segments"][row] > 0)
            # one rounding of float32 by the place in the row
            np.testing.assert_allclose(
                together[row, cut:stop], apart[row, : stop - cut], rtol=1e-5, atol=1e-6
            )

        # What is not seen changes no bit: other documents, and padding.
        for hidden_from, others in (
            (first, ~first),
            (packed["segments"] > 0, ~(packed["segments"] > 0)),
        ):
            assert others.any()
            tokens = np.where(others, (packed["tokens"] + 1) % TINY.vocab_size, packed["tokens"])
            changed = np.asarray(run(params, put(laid, packed | {"tokens": tokens}), None))
            np.testing.assert_array_equal(changed[hidden_from], together[hidden_from])
            assert np.all(np.any(changed[others] != together[others], -1))


@pytest.mark.parametrize(("config", "reach"), [(TINY, T), (LOCAL, 4)], ids=["global", "local"])
def test_gradients_prove_causality(config, reach):
    """x[t] has a gradient in the embedding of token s exactly where s reaches t: not from the
    future, not from another document, in two layers of window 3 from at most 4 before.
    """
    batch = numpy_batch(rows=1)
    batch["tokens"] = np.arange(T)[None]  # a row of the table for each place
    with layout(config=config, rows=1) as laid:
        run, params = features(laid, config), laid.params(drawn_params(laid, config))
        batch = put(laid, batch)

        @jax.jit
        def table_gradient(cotangent):
            loss = lambda table: jnp.vdot(
                run(params | {"embedding": table}, batch, None), cotangent
            )
            return jax.grad(loss)(params["embedding"])

        segments = np.asarray(batch["segments"])[0]
        assert set(segments) >= {1, 2}
        rng = np.random.default_rng(0)
        for t in np.flatnonzero(segments):
            cotangent = np.zeros((1, T, config.embed_dim), np.float32)
            cotangent[0, t] = rng.normal(size=config.embed_dim)
            got = np.any(np.asarray(table_gradient(cotangent))[:T] != 0, -1)
            s = np.arange(T)
            np.testing.assert_array_equal(
                got, (s <= t) & (t - s <= reach) & (segments == segments[t])
            )


@pytest.mark.parametrize("tied", [True, False])
def test_padded_vocabulary_takes_no_probability_and_no_gradient(tied):
    config = replace(TINY, tied=tied, layers=1)
    name = "embedding" if tied else "head_weight"
    with layout(config=config, rows=2) as laid:
        batch = numpy_batch(rows=2)
        batch = put(laid, batch | {k: batch[k] % config.vocab_size for k in ("tokens", "targets")})
        weights = all_count(batch["tokens"].shape)
        loss = lambda params: laid.model.loss(params, batch, weights, None)[0]
        run = jax.jit(jax.value_and_grad(loss))
        initial = drawn_params(laid, config)
        value, grads = run(laid.params(initial))
        large = initial[name].copy()
        by_token = large if tied else large.T
        by_token[config.vocab_size :] = 50.0
        changed, _ = run(laid.params(initial | {name: large}))
    assert changed == value
    gradient = np.asarray(grads[name]) if tied else np.asarray(grads[name]).T
    assert gradient.shape[0] == 128
    assert not np.any(gradient[config.vocab_size :])
    assert np.all(np.any(gradient[: config.vocab_size] != 0, -1))


def test_dropout_is_off_without_a_key():
    batch = numpy_batch(rows=2)
    got = []
    for rate in (0.0, 0.2):
        config = replace(TINY, dropout=rate, attention_dropout=rate)
        with layout(config=config, rows=2) as laid:
            params = laid.params(drawn_params(laid, config))
            got.append(np.asarray(features(laid, config)(params, put(laid, batch), None)))
    np.testing.assert_array_equal(*got)


@pytest.mark.slow
def test_dropout_is_on_with_a_key_and_the_same_on_every_mesh():
    config = replace(DECODER, attention_dropout=0.1)
    got = []
    for sizes in ({}, dict(data=2, fsdp=2, tensor=2, sequence=True, zero=3), dict(tensor=8)):
        with layout(config=config, **sizes) as laid:
            run, params = features(laid, config), laid.params(drawn_params(laid, config))
            key = lambda seed: jax.random.key(seed)
            got.append([run(params, laid.batch(), key(seed)) for seed in (0, 0, 1)])
            got[-1] = [np.asarray(x) for x in got[-1]]
    for first, again, other in got:
        np.testing.assert_array_equal(first, again)
        assert np.abs(first - other).mean() > 0.05
        # float32 sums in another order; one other bit of a mask would be seen at 0.01
        np.testing.assert_allclose(first, got[0][0], rtol=0, atol=1e-5)
