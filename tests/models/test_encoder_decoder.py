"""The encoder-decoder against the Transformer of 2017 and T5, written out in float64 NumPy, one
pair of a source and its target at a time.
"""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from config_border import load_config, override
from data.objective import ObjectiveConfig
from experiment import read_experiment
from models.beside import encoder_beside
from models.config import ModelConfig
from models.experts_config import ExpertsConfig
from models.relative_positions import buckets_of
from tests.drawn import decoder_of, drawn_params, put
from tests.models.test_decoder import gelu, layer_norm, rms
from tests.small import layout
from training.micro_batches import counted

S, T = 20, 16
# (row, source's start and stop, target's start and stop); what is left is padding. Sources that
# are longer, shorter and of one token.
PAIRS = [
    (0, (0, 5), (0, 9)),
    (0, (5, 16), (9, 13)),
    (1, (0, 20), (0, 16)),
    (2, (0, 1), (0, 2)),
    (2, (1, 14), (2, 15)),
]
SEQ2SEQ = ObjectiveConfig(name="seq2seq")

TRANSFORMER_2017 = ModelConfig(
    vocab_size=100, layers=2, embed_dim=16, mlp_dim=24, heads=4, kv_heads=4, head_dim=6,
    family="encoder_decoder", encoder_layers=3, cross="plain", attention="xla", max_length=32,
    norm="layer", norm_position="post", positions="sinusoidal", activation="relu", gated=False,
    mlp_bias=True, embed_scale=True,
)  # fmt: skip
T5 = replace(
    TRANSFORMER_2017, norm="rms", norm_position="pre", positions="relative", relative_buckets=8,
    relative_distance=10, mlp_bias=False, embed_scale=False, head_scale=True, query_scale=1.0,
)  # fmt: skip
T5_1_1 = replace(
    T5, gated=True, activation="gelu_tanh", tied=False, head_scale=False, source_tied=False,
    encoder_layers=1,
    query_scale=0.4,  # with its larger logits, 1.0 would be a test of float32
)  # fmt: skip
GATED = replace(
    T5, cross="gated", positions="learned", kv_heads=2, norm_position="sandwich", qkv_bias=True,
    attention="blocked", head_scale=False,
)  # fmt: skip


# --- The reference: (source tokens [S], tokens [T]) of one pair -> logits [T, V] ----------------


def attend(q_TNH, k_SKH, v_SKH, scale, causal, bias=None):
    """Query by query and head by head; `bias(distance, head)` is added to a score."""
    T, N, _ = q_TNH.shape
    out = np.zeros_like(q_TNH)
    for t in range(T):
        stop = t + 1 if causal else len(k_SKH)
        for n in range(N):
            head = n * k_SKH.shape[1] // N
            s = k_SKH[:stop, head] @ q_TNH[t, n] * scale
            if bias is not None:
                s = s + np.array([bias(i - t, n) for i in range(stop)])
            p = np.exp(s - s.max())
            out[t, n] = p @ v_SKH[:stop, head] / p.sum()
    return out


def attention(a, x_TD, memory_SD, scale, causal, bias=None, biases=False):
    def product(name, x):
        return np.einsum("td,dnh->tnh", x, a[name]) + (a[f"{name}_bias"] if biases else 0)

    heads = product("query", x_TD), product("key", memory_SD), product("value", memory_SD)
    return np.einsum("tnh,nhd->td", attend(*heads, scale, causal, bias), a["out"])


def layers(stack):
    blocks = stack["blocks"]
    return [
        jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(len(blocks["mlp"]["up"]))
    ]


def with_waves(x_TD):
    out = x_TD * 4.0  # sqrt(16)
    for t in range(len(x_TD)):
        for i in range(8):
            out[t, 2 * i] += math.sin(t / 10000 ** (2 * i / 16))
            out[t, 2 * i + 1] += math.cos(t / 10000 ** (2 * i / 16))
    return out


def transformer_2017(p, source, tokens):
    def feed_forward(x, m):
        return np.maximum(x @ m["up"] + m["up_bias"], 0) @ m["down"] + m["down_bias"]

    norm = lambda x, weights: layer_norm(x, weights, 1e-6)
    y = with_waves(p["embedding"][source])
    for w in layers(p["encoder"]["stack"]):
        y = norm(y + attention(w["attention"], y, y, 6**-0.5, False), w["attention_norm"])
        y = norm(y + feed_forward(y, w["mlp"]), w["mlp_norm"])
    x = with_waves(p["embedding"][tokens])
    for w in layers(p["stack"]):
        x = norm(x + attention(w["attention"], x, x, 6**-0.5, True), w["attention_norm"])
        x = norm(x + attention(w["cross"], x, y, 6**-0.5, False), w["cross_norm"])
        x = norm(x + feed_forward(x, w["mlp"]), w["mlp_norm"])
    return x @ p["embedding"].T


def bucket(distance, both_ways):
    """Of 8 buckets up to distance 10, of a key `distance` after the query: section 2.1 of T5."""
    first, count = 0, 8
    if both_ways:
        count = 4
        first = 4 if distance > 0 else 0
    back = abs(distance) if both_ways else max(0, -distance)
    if back < count // 2:
        return first + back
    share = math.log(back / (count // 2)) / math.log(10 / (count // 2))
    return first + min(count - 1, count // 2 + int(share * (count // 2)))


def t5(p, source, tokens, new=False):
    scale = 0.4 if new else 1.0
    norm = lambda x, weights: rms(x, weights["gain"], 1e-6)

    def feed_forward(x, m):
        if new:
            return (gelu(x @ m["gate"]) * (x @ m["up"])) @ m["down"]
        return np.maximum(x @ m["up"], 0) @ m["down"]

    tables = {False: p["relative"]["table"], True: p["encoder"]["relative"]["table"]}
    bias = {
        both: lambda distance, head, both=both: tables[both][bucket(distance, both), head]
        for both in tables
    }
    y = p["encoder" if new else "embedding"]
    y = (y["embedding"] if new else y)[source]
    for w in layers(p["encoder"]["stack"]):
        h = norm(y, w["attention_norm"])
        y = y + attention(w["attention"], h, h, scale, False, bias[True])
        y = y + feed_forward(norm(y, w["mlp_norm"]), w["mlp"])
    y = norm(y, p["encoder"]["final_norm"])
    x = p["embedding"][tokens]
    for w in layers(p["stack"]):
        h = norm(x, w["attention_norm"])
        x = x + attention(w["attention"], h, h, scale, True, bias[False])
        x = x + attention(w["cross"], norm(x, w["cross_norm"]), y, scale, False)
        x = x + feed_forward(norm(x, w["mlp_norm"]), w["mlp"])
    x = norm(x, p["final_norm"])
    return x @ p["head_weight"] if new else x / 4.0 @ p["embedding"].T  # sqrt(16)


def t5_1_1(p, source, tokens):
    return t5(p, source, tokens, new=True)


def gated(p, source, tokens):
    norm = lambda x, weights: rms(x, weights["gain"], 1e-6)
    relu = lambda x, m: np.maximum(x @ m["up"], 0) @ m["down"]

    def sublayer(x, w, name, change):
        return x + norm(change(norm(x, w[f"{name}_norm"])), w[f"{name}_post_norm"])

    def itself(w, causal):
        return lambda h: attention(w["attention"], h, h, 1.0, causal, biases=True)

    y = p["embedding"][source] + p["encoder"]["position"][: len(source)]
    for w in layers(p["encoder"]["stack"]):
        y = sublayer(y, w, "attention", itself(w, False))
        y = sublayer(y, w, "mlp", lambda h, w=w: relu(h, w["mlp"]))
    y = norm(y, p["encoder"]["final_norm"])
    x = p["embedding"][tokens] + p["position"][: len(tokens)]
    for w in layers(p["stack"]):
        x = sublayer(x, w, "attention", itself(w, True))
        gate = math.tanh(w["cross"]["gate"][0])
        x = sublayer(
            x,
            w,
            "cross",
            lambda h, w=w, g=gate: g * attention(w["cross"], h, y, 1.0, False, biases=True),
        )
        x = sublayer(x, w, "mlp", lambda h, w=w: relu(h, w["mlp"]))
    return norm(x, p["final_norm"]) @ p["embedding"].T


# --- The encoder-decoder against it --------------------------------------------------------------


def packed_batch():
    rng = np.random.default_rng(1)
    batch = {"targets": rng.integers(0, 100, (3, T))}
    for part, (name, length) in enumerate((("source_", S), ("", T)), 1):
        segments, positions = np.zeros((3, length), int), np.zeros((3, length), int)
        for pair in PAIRS:
            start, stop = pair[part]
            segments[pair[0], start:stop] = segments[pair[0]].max() + 1
            positions[pair[0], start:stop] = np.arange(stop - start)
        batch |= {
            f"{name}tokens": rng.integers(0, 100, (3, length)),
            f"{name}segments": segments,
            f"{name}positions": positions,
        }
    return batch


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        pytest.param(TRANSFORMER_2017, transformer_2017, id="2017"),
        pytest.param(T5, t5, id="t5"),
        pytest.param(T5_1_1, t5_1_1, id="t5_1_1"),
        pytest.param(GATED, gated, id="gated"),
    ],
)
def test_encoder_decoder_is_the_reference(config, reference):
    batch = packed_batch()
    with layout(config=config, objective=SEQ2SEQ, rows=3, length=T, chunk=20) as laid:
        params, build = drawn_params(laid, config), decoder_of(laid, config)

        @jax.jit
        def run(params, batch):
            model = build(params)
            loss, _ = laid.model.loss(params, batch, counted(batch), None)
            return model(batch), model.head().weight, loss

        hidden, head, loss = run(laid.params(params), put(laid, batch))
    head = np.asarray(head, np.float64)
    head = head if config.tied else head.T
    logits = np.asarray(hidden, np.float64) @ head[:100].T

    nll = 0.0
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    exact["embedding"] = exact["embedding"][:100]
    if not config.tied:
        exact["head_weight"] = exact["head_weight"][:, :100]
    for row, (first, last), (start, stop) in PAIRS:
        want = reference(
            exact, batch["source_tokens"][row, first:last], batch["tokens"][row, start:stop]
        )
        assert want.std() > 0.3  # something to compare
        np.testing.assert_allclose(logits[row, start:stop], want, rtol=0, atol=1e-5)
        targets = batch["targets"][row, start:stop]
        nll += np.sum(np.log(np.sum(np.exp(want), -1)) - want[np.arange(stop - start), targets])
    np.testing.assert_allclose(loss, nll, rtol=1e-6)  # a sum of 44 terms in float32


def test_what_is_not_seen_changes_no_bit():
    """Padding of the source, the sources of other targets, and with a gate of 0 all of it."""
    batch = packed_batch()
    own, other = batch["segments"] == 1, batch["source_segments"] != 1
    changed = batch | {
        "source_tokens": np.where(other, (batch["source_tokens"] + 1) % 100, batch["source_tokens"])
    }
    elsewhere = batch | {"source_tokens": (batch["source_tokens"] + 1) % 100}
    for config in (T5, replace(T5, cross="gated")):
        with layout(config=config, objective=SEQ2SEQ, rows=3, length=T) as laid:
            params, build = drawn_params(laid, config), decoder_of(laid, config)
            if config.cross == "gated":
                initial = jax.jit(laid.model.init)(jax.random.key(0))
                params["stack"]["blocks"]["cross"]["gate"] = np.asarray(
                    initial["stack"]["blocks"]["cross"]["gate"]
                )
            run = jax.jit(lambda params, batch, build=build: build(params)(batch))
            was, now, all_new = (
                np.asarray(run(laid.params(params), put(laid, b)))
                for b in (batch, changed, elsewhere)
            )
        np.testing.assert_array_equal(was[own], now[own])
        if config.cross == "gated":
            np.testing.assert_array_equal(was, all_new)
        else:
            assert np.all(np.any(was != all_new, -1)[batch["segments"] > 0])


def test_buckets_are_those_of_the_definition():
    """Bucket 4 of the encoder would be of keys after the query at distance 0."""
    far = 64  # beyond the last bucket's border
    for config, both_ways in ((T5, False), (encoder_beside(T5), True)):
        index = np.arange(far)
        buckets = buckets_of(config, index[None, :] - index[:, None])
        want = [[bucket(s - t, both_ways) for s in range(far)] for t in range(far)]
        np.testing.assert_array_equal(buckets, want)
        assert set(buckets.ravel()) == set(range(8)) - ({4} if both_ways else set())


def test_a_table_s_gradient_is_the_sum_of_those_of_its_layers():
    """One table that three layers read, against a table for each of them."""
    batch = packed_batch()
    with layout(config=T5, objective=SEQ2SEQ, rows=3, length=T) as laid:
        params, build = drawn_params(laid, T5), decoder_of(laid, T5)
        batch = put(laid, batch)

        def total(tables, params):
            """Layer by layer, each with its own table."""
            model = build(params)
            stream = model.embed(batch)
            for i, table in enumerate(tables):
                one = jax.tree.map(lambda a, i=i: a[i : i + 1], params["stack"])
                part = build(params | {"stack": one, "relative": {"table": table}})
                stream = part.run_blocks(stream, batch, None, i)[0]
            return jnp.sum(jnp.square(model.finish(stream, batch)))

        def shared(table, params):
            model = build(params | {"relative": {"table": table}})
            return jnp.sum(jnp.square(model(batch)))

        params = laid.params(params)
        table = params["relative"]["table"]
        want = sum(jax.jit(jax.grad(total))([table] * T5.layers, params))
        got = jax.jit(jax.grad(shared))(table, params)
    assert np.linalg.norm(want) > 0.1
    # sums of a few hundred terms of either sign, in another order
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.linalg.norm(want))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_layers": 0}, "config.model.encoder_layers = 0: config.model.family = 'encoder"),
        ({"cross": "none"}, "config.model.cross = 'none': config.model.family = 'encoder_decoder'"),
        (
            {"family": "decoder", "encoder_layers": 0},
            "config.model.cross = 'plain': config.model.family = 'decoder' has no encoder",
        ),
        ({"experts": ExpertsConfig(number=4)}, "config.experts.number = 4: not built for"),
        ({"attention": "rows"}, "config.model.attention = 'rows': not built for config.model.posi"),
        ({"relative_buckets": 6}, "config.model.relative_buckets = 6: a multiple of 4"),
        ({"relative_distance": 4}, "config.model.relative_distance = 4: more than 4"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError) as error:
        replace(T5, **change)
    assert str(error.value).startswith(message)


def test_a_source_that_does_not_divide_is_refused():
    """And one that is longer than the model allows; none is asked of a decoder."""

    def read(name, *flags):
        config = override(load_config(f"configs/{name}.py"), [f"--config.{f}" for f in flags])
        return read_experiment(config, 8)

    tensor = ("mesh.data=2", "mesh.tensor=4", "parallel.sequence=true")
    assert read("tiny_seq2seq", *tensor, "data.source_length=252").source_length == 252
    assert read("tiny").source_length == 0
    for flags, message in (
        (
            (*tensor, "data.source_length=254"),
            "config.data.sequence_length = 128 and config.data.source_length = 254: their greatest",
        ),
        (
            ("data.source_length=300",),
            "config.data.source_length = 300 is longer than config.model.max_length = 256",
        ),
        (("objective.name=causal_lm",), "config.objective.name = 'causal_lm': config.model.fam"),
    ):
        with pytest.raises(ValueError) as error:
            read("tiny_seq2seq", *flags)
        assert str(error.value).startswith(message)
