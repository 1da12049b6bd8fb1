"""ViT, image prefix and classification against the same written out in float64 NumPy."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data.objective import ObjectiveConfig
from models.config import ModelConfig
from models.vision_config import VisionConfig
from models.vision_language import CrossVisionLanguage, VisionLanguage
from parallel.remat import RematConfig
from tests.drawn import drawn_params
from tests.models.test_decoder import frequencies, gelu, layer_norm, merge_heads, project, rms, turn
from tests.small import layout
from training.micro_batches import counted, loss_weights

ROWS, T = 3, 6
IMAGES = VisionConfig(image_size=6, patch_size=2, channels=3)
P, K = 9, 12
SEEING = replace(IMAGES, layers=2, embed_dim=20, mlp_dim=24, heads=4)
GEMMA = ModelConfig(
    vocab_size=100, layers=3, embed_dim=16, mlp_dim=24, heads=4, kv_heads=1, head_dim=6,
    attention="xla", max_length=P + T, family="vision_language", vision=SEEING,
    norm_plus_one=True, activation="gelu_tanh", embed_scale=True, rope_theta=50.0,
)  # fmt: skip
GPT2 = replace(
    GEMMA, kv_heads=4, norm="layer", norm_plus_one=False, positions="learned", gated=False,
    embed_scale=False, vision=replace(SEEING, projector="mlp"),
)  # fmt: skip
FLAMINGO = replace(GPT2, cross="gated")
TASKS = {"digit": 10, "parity": 2}
VIT = ModelConfig(
    vocab_size=1, layers=2, embed_dim=20, mlp_dim=24, heads=4, kv_heads=4, head_dim=5,
    attention="xla", family="vision", vision=IMAGES, tasks=tuple(TASKS.items()), norm="layer",
    positions="learned", max_length=P, activation="gelu", gated=False, qkv_bias=True,
    attention_out_bias=True, mlp_bias=True, token_head=False,
)  # fmt: skip
CAPTIONING = ObjectiveConfig(name="captioning")
CLASSIFICATION = ObjectiveConfig(name="classification", tasks=TASKS)

erf = np.vectorize(math.erf)


def exact_gelu(x):
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


# --- The reference: one row ----------------------------------------------------------------------


def attend(q_TNH, k_TKH, v_TKH, prefix):
    """Query by query and head by head: a query sees itself, what is before it, and the prefix."""
    T, N, H = q_TNH.shape
    out = np.zeros_like(q_TNH)
    for t in range(T):
        stop = max(t + 1, prefix)
        for n in range(N):
            head = n * k_TKH.shape[1] // N
            s = k_TKH[:stop, head] @ q_TNH[t, n] * H**-0.5
            p = np.exp(s - s.max())
            out[t, n] = p @ v_TKH[:stop, head] / p.sum()
    return out


def layers_of(p):
    blocks = p["stack"]["blocks"]
    for i in range(len(blocks["mlp"]["up"])):
        w = jax.tree.map(lambda leaf, i=i: leaf[i], blocks)
        yield w, w["attention"], w["mlp"]


def vit(p, patches):
    """[P, K] -> [P, Dv]."""
    x = patches @ p["patch"] + p["patch_bias"] + p["position"]
    for w, a, m in layers_of(p):
        q, k, v = project(layer_norm(x, w["attention_norm"], 1e-6), a, biases=True)
        x = x + merge_heads(attend(q, k, v, len(x)), a) + a["out_bias"]
        h = exact_gelu(layer_norm(x, w["mlp_norm"], 1e-6) @ m["up"] + m["up_bias"])
        x = x + h @ m["down"] + m["down_bias"]
    return layer_norm(x, p["final_norm"], 1e-6)


def gemma(p, patches, tokens):
    """Logits of the text."""
    to = p["images"]["projector"]["out"]
    norm = lambda x, weights: rms(x, 1 + weights["gain"], 1e-6)
    image = vit(p["images"]["vit"], patches) @ to["weight"] + to["bias"]
    x = np.concatenate([image, p["embedding"][tokens] * 4.0])  # sqrt(16)
    turns = frequencies(50.0, 6)
    for w, a, m in layers_of(p):
        q, k, v = project(norm(x, w["attention_norm"]), a)
        x = x + merge_heads(attend(turn(q, turns), turn(k, turns), v, P), a)
        h = norm(x, w["mlp_norm"])
        x = x + (gelu(h @ m["gate"]) * (h @ m["up"])) @ m["down"]
    return norm(x[P:], p["final_norm"]) @ p["embedding"].T


def gpt2(p, patches, tokens):
    one, two = (p["images"]["projector"][name] for name in ("hidden", "out"))
    image = exact_gelu(vit(p["images"]["vit"], patches) @ one["weight"] + one["bias"])
    image = image @ two["weight"] + two["bias"]
    x = np.concatenate([image, p["embedding"][tokens]]) + p["position"][: P + len(tokens)]
    for w, a, m in layers_of(p):
        q, k, v = project(layer_norm(x, w["attention_norm"], 1e-6), a)
        x = x + merge_heads(attend(q, k, v, P), a)
        x = x + gelu(layer_norm(x, w["mlp_norm"], 1e-6) @ m["up"]) @ m["down"]
    return layer_norm(x[P:], p["final_norm"], 1e-6) @ p["embedding"].T


def flamingo(p, patches, tokens):
    one, two = (p["images"]["projector"][name] for name in ("hidden", "out"))
    image = exact_gelu(vit(p["images"]["vit"], patches) @ one["weight"] + one["bias"])
    image = image @ two["weight"] + two["bias"]
    x = p["embedding"][tokens] + p["position"][: len(tokens)]
    for w, a, m in layers_of(p):
        q, k, v = project(layer_norm(x, w["attention_norm"], 1e-6), a)
        x = x + merge_heads(attend(q, k, v, 0), a)
        c = w["cross"]
        q, _, _ = project(layer_norm(x, w["cross_norm"], 1e-6), c)
        _, k, v = project(image, c)
        x = x + np.tanh(c["gate"]) * merge_heads(attend(q, k, v, P), c)
        x = x + gelu(layer_norm(x, w["mlp_norm"], 1e-6) @ m["up"]) @ m["down"]
    return layer_norm(x, p["final_norm"], 1e-6) @ p["embedding"].T


# --- The models against it -----------------------------------------------------------------------


def caption_batch():
    """Rows of 6, 4 and 1 tokens, each after an image."""
    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(0, GEMMA.vocab_size, (2, ROWS, T)).astype(np.int32)
    index = np.arange(T, dtype=np.int32)[None].repeat(ROWS, 0)
    segments = (index < np.array([[6], [4], [1]])).astype(np.int32)
    patches = rng.random((ROWS, P, K), np.float32)
    batch = dict(tokens=tokens, targets=targets, segments=segments, positions=index)
    return batch | {"patches": patches}


def model_of(laid, config):
    """params -> the module with these parameters."""
    kind = VisionLanguage if config.cross == "none" else CrossVisionLanguage
    build = lambda key: kind(config, laid.model.rules, RematConfig(), nnx.Rngs(params=key))
    graph, _ = nnx.split(nnx.eval_shape(build, jax.random.key(0)))
    return lambda params: nnx.merge(graph, params)


@pytest.fixture(scope="module", params=["gemma", "gpt2", "flamingo"])
def captioner(request):
    """(config, reference, parameters, {name of a batch: (stream, hidden, loss)}), as NumPy."""
    config = {"gemma": GEMMA, "gpt2": GPT2, "flamingo": FLAMINGO}[request.param]
    batch = caption_batch()
    last_patch, last_token = batch["patches"].copy(), batch["tokens"].copy()
    last_patch[:, -1] += 1
    last_token[0, 4] = (last_token[0, 4] + 1) % config.vocab_size
    batches = {
        "as it is": batch,
        "last patch": batch | {"patches": last_patch},
        "a token": batch | {"tokens": last_token},
        "images permuted": batch | {"patches": np.roll(batch["patches"], 1, 0)},
    }
    with layout(config=config, objective=CAPTIONING, rows=ROWS, length=T) as laid:
        params, build = drawn_params(laid, config), model_of(laid, config)

        @jax.jit
        def run(params, batch):
            model = build(params)
            stream, _ = model.run_blocks(model.embed(batch), batch)
            loss, _ = laid.model.loss(params, batch, counted(batch), None)
            return stream, model.finish(stream, batch), loss

        placed = laid.params(params)
        found = {
            name: jax.tree.map(np.asarray, run(placed, laid.placed(b)))
            for name, b in batches.items()
        }
    return config, globals()[request.param], params, found


def test_captions_are_the_reference(captioner):
    config, reference, params, found = captioner
    batch, (_, hidden, loss) = caption_batch(), found["as it is"]
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    exact["embedding"] = exact["embedding"][: config.vocab_size]
    logits = hidden.astype(np.float64) @ exact["embedding"].T
    nll = 0.0
    for row, length in enumerate((6, 4, 1)):
        patches = batch["patches"][row].astype(np.float64)
        want = reference(exact, patches, batch["tokens"][row, :length])
        assert want.std() > 0.5  # something to compare
        np.testing.assert_allclose(logits[row, :length], want, rtol=0, atol=2e-5)
        picked = want[np.arange(length), batch["targets"][row, :length]]
        nll += np.sum(np.log(np.sum(np.exp(want), -1)) - picked)
    np.testing.assert_allclose(loss, nll, rtol=1e-6)  # a sum of 11 terms in float32


def test_tokens_of_an_image_see_each_other_and_all_text_sees_them(captioner):
    found = captioner[-1]
    moved = np.abs(found["last patch"][0] - found["as it is"][0]).max(-1)
    assert moved.shape == (ROWS, P + T)
    assert (moved[:, :P] > 1e-3).all()
    assert (moved[:, P : P + 1] > 1e-3).all()
    assert (moved[0] > 1e-3).all()


def test_no_text_leaks_back(captioner):
    found = captioner[-1]
    before, after = (found[name][0][0] for name in ("as it is", "a token"))
    np.testing.assert_array_equal(before[: P + 4], after[: P + 4])
    assert (np.abs(before[P + 4 :] - after[P + 4 :]).max(-1) > 1e-3).all()


def test_the_image_counts(captioner):
    found = captioner[-1]
    assert abs(found["images permuted"][2] - found["as it is"][2]) > 1e-2


def test_classification_is_the_reference():
    rng = np.random.default_rng(2)
    patches = rng.random((ROWS, P, K), np.float32)
    labels = {"digit": np.array([3, 9, 0]), "parity": np.array([1, 1, 0])}
    batch = {"patches": patches} | {f"label_{n}": a.astype(np.int32) for n, a in labels.items()}
    with layout(config=VIT, objective=CLASSIFICATION, rows=ROWS, length=P) as laid:
        params = drawn_params(laid, VIT)
        on_device = laid.placed(batch)
        loss, sums = jax.jit(lambda p, b: laid.model.loss(p, b, counted(b), None))(
            laid.params(params), on_device
        )
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    want, correct = dict.fromkeys(TASKS, 0.0), dict.fromkeys(TASKS, 0)
    for row in range(ROWS):
        features = vit(exact["vision"], patches[row].astype(np.float64)).mean(0)
        for task, head in exact["heads"].items():
            logits = features @ head["weight"] + head["bias"]
            want[task] += np.log(np.sum(np.exp(logits))) - logits[labels[task][row]]
            correct[task] += logits.argmax() == labels[task][row]
    assert set(exact["heads"]) == set(TASKS)
    np.testing.assert_allclose(loss, sum(want.values()), rtol=1e-6)
    for task in TASKS:
        np.testing.assert_allclose(sums[f"{task}_nll_sum"], want[task], rtol=2e-6)
        assert float(sums[f"{task}_correct_sum"]) == correct[task]


def test_an_image_without_a_label_does_not_count():
    rng = np.random.default_rng(3)
    patches = rng.random((2, P, K), np.float32)
    both = {f"label_{task}": np.zeros(2, np.int32) for task in TASKS}
    one = {name: np.array([0, -1], np.int32) for name in both}
    with layout(config=VIT, objective=CLASSIFICATION, rows=2, length=P) as laid:
        params = laid.params(drawn_params(laid, VIT))

        @jax.jit
        def run(params, batch):
            weights, tokens = loss_weights(batch, jnp.float32(1))
            return *laid.model.loss(params, batch, weights, None), tokens

        def of(patches, labels):
            return run(params, laid.placed({"patches": patches} | labels))

        mean, _, tokens = of(patches, both)
        first, sums, fewer = of(patches, one)
        same, _, _ = of(patches[[0, 0]], one)
        second, _, _ = of(patches[[1, 1]], one)
    assert (tokens, fewer) == (2 * P, P)
    assert first == same
    assert sums["digit_correct_sum"] in (0, 1)
    np.testing.assert_allclose(mean, (first + second) / 2, rtol=1e-6)


BAD = {
    "no size": (dict(family="vision"), "config.vision.image_size = 0"),
    "images for a decoder": (dict(vision=IMAGES), "config.vision.image_size = 6"),
    "no ViT": (dict(family="vision_language", vision=IMAGES), "config.vision.layers = 0"),
    "two ViTs": (dict(family="vision", vision=SEEING), "config.vision.layers = 2"),
    "projector of nothing": (
        dict(family="vision", vision=replace(IMAGES, projector="mlp")),
        "config.vision.projector = 'mlp'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused(name):
    values, said = BAD[name]
    plain = replace(GEMMA, family="decoder", vision=VisionConfig())
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        replace(plain, **values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (dict(image_size=9, patch_size=2), "patch_size = 2 does not divide"),
        (dict(heads=3, embed_dim=16), "heads = 3 does not divide"),
        (dict(channels=4), "channels = 4: 1 .grey. or 3"),
        (dict(patch_size=0), "patch_size = 0: at least 1"),
        (dict(image_size=-8), "image_size = -8: 0 or more"),
        (dict(projector="conv"), "projector = 'conv': choose one of"),
    ],
)
def test_images_that_cannot_be_are_refused(values, said):
    with pytest.raises(ValueError, match=r"config\.vision\." + said):
        VisionConfig(**values)


def test_rows_that_a_divided_stream_cannot_have_are_refused():
    rows = GEMMA.row_dims(12, 0)["residual_seq"]
    assert rows[0] == 3  # of 9 patches and 12 tokens, each alone divided
    said = r"patches of an image .* = 1 does not divide by"
    kind = dict(config=GEMMA, objective=CAPTIONING, tensor=2, sequence=True)
    with pytest.raises(ValueError, match=said), layout(length=8, **kind):
        pass
