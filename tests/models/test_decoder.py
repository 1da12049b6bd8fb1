"""The decoder against families of models written out in float64 NumPy, one document at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from models.config import ModelConfig
from tests.drawn import decoder_of, drawn_params, put
from tests.small import layout
from training.micro_batches import counted

T = 16
# (row, first token, stop) of every document; what is left is padding.
DOCUMENTS = [(0, 0, 7), (0, 7, 13), (1, 0, 16), (2, 0, 1), (2, 1, 15)]

TINY = ModelConfig(
    vocab_size=100, layers=3, embed_dim=16, mlp_dim=24, heads=4, kv_heads=4, head_dim=6,
    attention="xla", max_length=32,
)  # fmt: skip
GPT2 = replace(
    TINY, norm="layer", norm_eps=1e-5, positions="learned", activation="gelu_tanh", gated=False,
    qkv_bias=True, attention_out_bias=True, mlp_bias=True,
)  # fmt: skip
LLAMA = replace(
    TINY, kv_heads=2, norm_eps=1e-5, rope_theta=10.0, rope_scaling="llama3", rope_factor=8.0,
    rope_low_freq_factor=1.0, rope_high_freq_factor=2.0, rope_original_length=16, tied=False,
)  # fmt: skip
GEMMA = replace(
    TINY, kv_heads=1, norm_position="sandwich", norm_plus_one=True, qk_norm=True,
    rope_theta=50.0, rope_local_theta=5.0, rope_scaling="linear", rope_factor=8.0, window=3,
    pattern=("local", "global"), activation="gelu_tanh", embed_scale=True,
    query_scale=0.3, attention_softcap=2.0, logit_softcap=3.0, attention="blocked",
)  # fmt: skip
TRANSFORMER_2017 = replace(
    TINY, norm="layer", norm_position="post", positions="sinusoidal", activation="relu",
    gated=False, mlp_bias=True, embed_scale=True, layers=2,
)  # fmt: skip
QWEN = replace(TINY, kv_heads=2, qk_norm=True, qkv_bias=True, rope_theta=100.0)


# --- The reference: tokens [T] of one document -> logits [T, V] ---------------------------------


def rms(x, gain, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain


def layer_norm(x, norm, eps):
    x = x - x.mean(-1, keepdims=True)
    return rms(x, norm["gain"], eps) + norm["bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def turn(x_TNH, frequencies):
    """Features (i, i + H/2) as a complex number, turned by position times frequency."""
    half = x_TNH.shape[-1] // 2
    angle = np.arange(len(x_TNH))[:, None, None] * np.asarray(frequencies)
    z = (x_TNH[..., :half] + 1j * x_TNH[..., half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)


def frequencies(theta, H):
    return np.array([theta ** (-2 * i / H) for i in range(H // 2)])


def attend(q_TNH, k_TKH, v_TKH, scale, window=None, cap=None):
    """Query by query and head by head."""
    T, N, _ = q_TNH.shape
    out = np.zeros_like(q_TNH)
    for t in range(T):
        first = 0 if window is None else max(0, t - window + 1)
        for n in range(N):
            head = n * k_TKH.shape[1] // N
            s = k_TKH[first : t + 1, head] @ q_TNH[t, n] * scale
            s = s if cap is None else cap * np.tanh(s / cap)
            p = np.exp(s - s.max())
            out[t, n] = p @ v_TKH[first : t + 1, head] / p.sum()
    return out


def project(x_TD, a, biases=False):
    out = [np.einsum("td,dnh->tnh", x_TD, a[name]) for name in ("query", "key", "value")]
    if biases:
        out = [
            y + a[f"{name}_bias"] for y, name in zip(out, ("query", "key", "value"), strict=True)
        ]
    return out


def merge_heads(x_TNH, a):
    return np.einsum("tnh,nhd->td", x_TNH, a["out"])


def layers_of(p):
    blocks = p["stack"]["blocks"]
    for i in range(len(blocks["mlp"]["up"])):
        w = jax.tree.map(lambda leaf, i=i: leaf[i], blocks)
        yield i, w, w["attention"], w["mlp"]


def gpt2(p, tokens):
    x = p["embedding"][tokens] + p["position"][: len(tokens)]
    for _, w, a, m in layers_of(p):
        q, k, v = project(layer_norm(x, w["attention_norm"], 1e-5), a, biases=True)
        x = x + merge_heads(attend(q, k, v, 6**-0.5), a) + a["out_bias"]
        h = layer_norm(x, w["mlp_norm"], 1e-5) @ m["up"] + m["up_bias"]
        x = x + gelu(h) @ m["down"] + m["down_bias"]
    return layer_norm(x, p["final_norm"], 1e-5) @ p["embedding"].T


def llama(p, tokens):
    turns = []
    for f in frequencies(10.0, 6):  # those of 3.1: fast ones stay, slow ones are 8 times slower
        waves = 16 * f / (2 * math.pi)  # of this feature in the original context of 16
        share = (waves - 1) / (2 - 1)
        turns.append(f if waves > 2 else f / 8 if waves < 1 else share * f + (1 - share) * f / 8)
    assert turns[0] == 1.0
    assert turns[2] < 0.03  # and the one between them is blended
    x = p["embedding"][tokens]
    for _, w, a, m in layers_of(p):
        q, k, v = project(rms(x, w["attention_norm"]["gain"], 1e-5), a)
        x = x + merge_heads(attend(turn(q, turns), turn(k, turns), v, 6**-0.5), a)
        h = rms(x, w["mlp_norm"]["gain"], 1e-5)
        x = x + (silu(h @ m["gate"]) * (h @ m["up"])) @ m["down"]
    return rms(x, p["final_norm"]["gain"], 1e-5) @ p["head_weight"]


def gemma(p, tokens):
    norm = lambda x, weights: rms(x, 1 + weights["gain"], 1e-6)
    x = p["embedding"][tokens] * 4.0  # sqrt(16)
    for i, w, a, m in layers_of(p):
        local = i % 2 == 0
        turns = frequencies(5.0, 6) if local else frequencies(50.0, 6) / 8
        q, k, v = project(norm(x, w["attention_norm"]), a)
        q, k = turn(norm(q, a["query_norm"]), turns), turn(norm(k, a["key_norm"]), turns)
        y = merge_heads(attend(q, k, v, 0.3, window=3 if local else None, cap=2.0), a)
        x = x + norm(y, w["attention_post_norm"])
        h = norm(x, w["mlp_norm"])
        x = x + norm((gelu(h @ m["gate"]) * (h @ m["up"])) @ m["down"], w["mlp_post_norm"])
    logits = norm(x, p["final_norm"]) @ p["embedding"].T
    return 3.0 * np.tanh(logits / 3.0)


def transformer_2017(p, tokens):
    x = p["embedding"][tokens] * 4.0
    for t in range(len(tokens)):
        for i in range(8):
            x[t, 2 * i] += math.sin(t / 10000 ** (2 * i / 16))
            x[t, 2 * i + 1] += math.cos(t / 10000 ** (2 * i / 16))
    for _, w, a, m in layers_of(p):
        x = x + merge_heads(attend(*project(x, a), 6**-0.5), a)
        x = layer_norm(x, w["attention_norm"], 1e-6)
        x = x + np.maximum(x @ m["up"] + m["up_bias"], 0) @ m["down"] + m["down_bias"]
        x = layer_norm(x, w["mlp_norm"], 1e-6)
    return x @ p["embedding"].T


def qwen(p, tokens):
    turns = frequencies(100.0, 6)
    x = p["embedding"][tokens]
    for _, w, a, m in layers_of(p):
        q, k, v = project(rms(x, w["attention_norm"]["gain"], 1e-6), a, biases=True)
        q = turn(rms(q, a["query_norm"]["gain"], 1e-6), turns)
        k = turn(rms(k, a["key_norm"]["gain"], 1e-6), turns)
        x = x + merge_heads(attend(q, k, v, 6**-0.5), a)
        h = rms(x, w["mlp_norm"]["gain"], 1e-6)
        x = x + (silu(h @ m["gate"]) * (h @ m["up"])) @ m["down"]
    return rms(x, p["final_norm"]["gain"], 1e-6) @ p["embedding"].T


# --- The decoder against it ----------------------------------------------------------------------


def packed_batch():
    tokens, targets = np.random.default_rng(1).integers(0, TINY.vocab_size, (2, 3, T))
    segments, positions = np.zeros((3, T), int), np.zeros((3, T), int)
    for row, start, stop in DOCUMENTS:
        segments[row, start:stop] = segments[row].max() + 1
        positions[row, start:stop] = np.arange(stop - start)
    return dict(tokens=tokens, targets=targets, segments=segments, positions=positions)


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        pytest.param(GPT2, gpt2, id="gpt2"),
        pytest.param(LLAMA, llama, id="llama"),
        pytest.param(GEMMA, gemma, id="gemma"),
        pytest.param(TRANSFORMER_2017, transformer_2017, id="2017"),
        pytest.param(QWEN, qwen, id="qwen"),
    ],
)
def test_decoder_is_the_reference(config, reference):
    batch = packed_batch()
    with layout(config=config, rows=3, length=T, chunk=20) as laid:
        params, build = drawn_params(laid, config), decoder_of(laid, config)

        @jax.jit
        def run(params, batch):
            decoder = build(params)
            weights = counted(batch)
            loss, _ = laid.model.loss(params, batch, weights, None)
            return decoder(batch), decoder.head().weight, loss

        hidden, head, loss = run(laid.params(params), put(laid, batch))
    head = np.asarray(head, np.float64)
    head = head if config.tied else head.T
    logits = np.asarray(hidden, np.float64) @ head[: config.vocab_size].T
    if config.logit_softcap:
        logits = config.logit_softcap * np.tanh(logits / config.logit_softcap)

    nll = 0.0
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    exact["embedding"] = exact["embedding"][: config.vocab_size]
    if not config.tied:
        exact["head_weight"] = exact["head_weight"][:, : config.vocab_size]
    for row, start, stop in DOCUMENTS:
        want = reference(exact, batch["tokens"][row, start:stop])
        assert want.std() > 0.5  # something to compare
        # Rounding of float32, which differs from CPU to CPU: 1.03e-5 was seen.
        np.testing.assert_allclose(logits[row, start:stop], want, rtol=0, atol=2e-5)
        targets = batch["targets"][row, start:stop]
        picked = want[np.arange(stop - start), targets]
        nll += np.sum(np.log(np.sum(np.exp(want), -1)) - picked)
    np.testing.assert_allclose(loss, nll, rtol=1e-6)  # a sum of 44 terms in float32
