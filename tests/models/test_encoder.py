"""The encoder against BERT written out in float64, what its tokens see, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.config import ModelConfig
from models.config_checks import without_effect
from models.encoder_heads import EncoderWithHeads
from parallel.remat import RematConfig
from tests.drawn import drawn_params
from tests.families import BERT, LABELLED, encoder_batch
from tests.small import DECODER, layout

CONFIG = replace(LABELLED, layers=2, dropout=0.0)


def built(laid, config, params) -> EncoderWithHeads:
    make = lambda: EncoderWithHeads(config, laid.model.rules, RematConfig(), nnx.Rngs(params=0))
    graph, _ = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, params)


def outputs(laid, config, params, batch):
    """Hidden states of tokens, as the loss head reads them, and logits of tasks."""

    def run(params, batch):
        encoder = built(laid, config, params)
        x_BTD = encoder.finish(encoder.run_blocks(encoder.embed(batch), batch))
        return encoder.token_features(x_BTD), encoder.task_logits(x_BTD)

    return jax.tree.map(np.asarray, jax.jit(run)(params, batch))


# --- BERT written out -----------------------------------------------------------------------------


def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG.norm_eps) * p["gain"] + p["bias"]


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attend(x, p, segments):
    q, k, v = (
        np.einsum("btd,dnh->btnh", x, p[name]) + p[f"{name}_bias"]
        for name in ("query", "key", "value")
    )
    scores = np.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])
    seen = (segments[:, :, None] == segments[:, None]) & (segments[:, :, None] > 0)
    weights = np.where(seen[:, None], np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bnts,bsnh->btnh", weights, v)
    return np.einsum("btnh,nhd->btd", out, p["out"]) + p["out_bias"]


def bert(params, batch):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = p["embedding"][batch["tokens"]] + p["token_type"][batch["token_types"]]
    x = norm(x + p["position"][batch["positions"] + 2], p["embed_norm"])
    for layer in range(CONFIG.layers):
        block = jax.tree.map(lambda a, i=layer: a[i], p["stack"]["blocks"])
        x = norm(x + attend(x, block["attention"], batch["segments"]), block["attention_norm"])
        mlp = block["mlp"]
        y = gelu(x @ mlp["up"] + mlp["up_bias"]) @ mlp["down"] + mlp["down_bias"]
        x = norm(x + y, block["mlp_norm"])
    dense = lambda x, p: x @ p["weight"] + p["bias"]
    transform, pooled = p["head_transform"], np.tanh(dense(x[:, 0], p["pooler"]["dense"]))
    hidden = norm(gelu(dense(x, transform["dense"])), transform["norm"])
    return hidden, {name: dense(pooled, head) for name, head in p["heads"].items()}


@pytest.mark.parametrize(
    "sizes", [{}, {"fsdp": 2, "tensor": 4, "zero": 3, "sequence": True}], ids=["one", "eight"]
)
def test_it_is_bert(sizes):
    batch = encoder_batch(0)
    with layout(config=CONFIG, **sizes) as laid:
        drawn = drawn_params(laid, CONFIG)
        hidden, logits = outputs(laid, CONFIG, laid.params(drawn), laid.placed(batch))
    want_hidden, want_logits = bert(drawn, batch)
    there = batch["segments"] > 0
    # float32 through two layers of norms, whose results are of order one.
    np.testing.assert_allclose(hidden[there], want_hidden[there], rtol=1e-4, atol=1e-4)
    assert logits.keys() == want_logits.keys() == {"digit", "parity"}
    for name, got in logits.items():
        np.testing.assert_allclose(got, want_logits[name], rtol=1e-4, atol=1e-4)


def test_tokens_are_of_the_first_type_where_none_is_given():
    batch = encoder_batch(0)
    first = batch | {"token_types": np.zeros_like(batch["tokens"])}
    none = {name: array for name, array in batch.items() if name != "token_types"}
    with layout(config=CONFIG) as laid:
        params = laid.params(drawn_params(laid, CONFIG))
        given, zero, left_out = (
            outputs(laid, CONFIG, params, laid.placed(b))[0] for b in (batch, first, none)
        )
    np.testing.assert_array_equal(left_out, zero)
    assert np.abs(given - zero).max() > 0.1


def test_a_token_sees_its_document_both_ways():
    """By gradients of one token's features with respect to all embeddings."""
    batch = encoder_batch(0)
    batch["segments"] = np.repeat([[1] * 6 + [2] * 7 + [0] * 3], 8, 0).astype(np.int32)
    with layout(config=CONFIG) as laid:
        params, placed = laid.params(drawn_params(laid, CONFIG)), laid.placed(batch)

        def of_one(x_BTD):
            encoder = built(laid, CONFIG, params)
            return jnp.sum(encoder.run_blocks(x_BTD, placed)[0, 8] * jnp.arange(32.0))

        x_BTD = jax.jit(lambda: built(laid, CONFIG, params).embed(placed))()
        seen = np.abs(np.asarray(jax.jit(jax.grad(of_one))(x_BTD))).sum(-1) > 0
    assert seen[0].tolist() == [False] * 6 + [True] * 7 + [False] * 3
    assert not seen[1:].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_types": -1}, "config.model.token_types = -1: 0"),
        ({"position_offset": -1}, "config.model.position_offset = -1: 0"),
        (
            {"position_offset": 2, "positions": "rope"},
            "config.model.position_offset = 2: rows of a table, and config.model.positions = ",
        ),
    ],
)
def test_what_an_encoder_cannot_be(changes, message):
    with pytest.raises(ValueError) as error:
        replace(BERT, **changes)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "name", ["token_types", "embed_norm", "head_transform", "head_bias", "pooler"]
)
def test_what_a_decoder_does_not_have(name):
    with pytest.raises(ValueError) as error:
        replace(DECODER, **{name: type(getattr(ModelConfig, name))(1)})
    assert str(error.value).startswith(f"config.model.{name} = ")
    assert "'encoder' alone, and it is 'decoder'" in str(error.value)


def test_keys_without_effect_are_said():
    assert without_effect(BERT) == [
        "config.model.pooler has no effect: there are no config.objective.tasks"
    ]
    assert not without_effect(LABELLED)
    rows_alone = replace(LABELLED, token_head=False)
    assert [note.split()[0] for note in without_effect(rows_alone)] == [
        "config.model.head_transform",
        "config.model.head_bias",
    ]
