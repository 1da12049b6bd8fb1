"""ViT, projector and image prefix compute what PaliGemma computes in `transformers`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from data.images import to_patches
from data.objective import ObjectiveConfig
from models.config import ModelConfig
from models.vision_config import VisionConfig
from models.vision_language import VisionLanguage
from parallel.remat import RematConfig
from tests.hf.parity import LOGITS
from tests.small import layout

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # theirs are not ours

ROWS, T, P, VOCAB = 2, 7, 9, 100
OURS = ModelConfig(
    vocab_size=VOCAB, layers=2, embed_dim=16, mlp_dim=24, heads=4, kv_heads=1, head_dim=6,
    attention="xla", max_length=32, family="vision_language", norm_plus_one=True,
    activation="gelu_tanh", embed_scale=True,
    vision=VisionConfig(12, 4, 3, layers=2, embed_dim=20, mlp_dim=28, heads=4),
)  # fmt: skip


def random_model(seed: int) -> Any:
    """Theirs with random weights, biases and gains too."""
    torch.manual_seed(seed)
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 20, "intermediate_size": 28,
        "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4, "image_size": 12,
        "hidden_act": "gelu", "projection_dim": 16, "vision_use_head": False,
    }  # fmt: skip
    text = {
        "model_type": "gemma", "hidden_size": 16, "intermediate_size": 24, "head_dim": 6,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
        "vocab_size": VOCAB,
    }  # fmt: skip
    config = transformers.PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        projection_dim=16,
        hidden_size=16,
        image_token_index=VOCAB - 1,
        attn_implementation="eager",
    )
    model = transformers.PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def our_params(theirs: dict[str, np.ndarray], like: Any) -> Any:
    """Their weights as our tree."""

    def stacked(name: str, layers: int = 2) -> np.ndarray:
        return np.stack([theirs[name.format(i)] for i in range(layers)])

    def products(prefix: str, heads: int, kv_heads: int, H: int, out: str) -> dict[str, Any]:
        into = lambda name, N: stacked(f"{prefix}{name}.weight").swapaxes(1, 2).reshape(2, -1, N, H)
        return {
            "query": into("q_proj", heads),
            "key": into("k_proj", kv_heads),
            "value": into("v_proj", kv_heads),
            "out": stacked(f"{prefix}{out}.weight").swapaxes(1, 2).reshape(2, heads, H, -1),
        }

    text, tower = "model.language_model.", "model.vision_tower."
    layer = text + "layers.{}."
    mlp = {
        ours: stacked(f"{layer}mlp.{name}_proj.weight").swapaxes(1, 2)
        for ours, name in (("gate", "gate"), ("up", "up"), ("down", "down"))
    }
    decoder = {
        "embedding": np.zeros(like["embedding"].shape, np.float32),
        "stack": {
            "blocks": {
                "attention": products(f"{layer}self_attn.", 4, 1, 6, "o_proj"),
                "mlp": mlp,
                "attention_norm": {"gain": stacked(f"{layer}input_layernorm.weight")},
                "mlp_norm": {"gain": stacked(f"{layer}post_attention_layernorm.weight")},
            }
        },
        "final_norm": {"gain": theirs[f"{text}norm.weight"]},
    }
    decoder["embedding"][:VOCAB] = theirs[f"{text}embed_tokens.weight"]

    def norm(name: str) -> dict[str, np.ndarray]:
        of = stacked if "{}" in name else theirs.__getitem__
        return {"gain": of(f"{name}.weight"), "bias": of(f"{name}.bias")}

    layer = tower + "encoder.layers.{}."
    attention = products(f"{layer}self_attn.", 4, 4, 5, "out_proj")
    for ours, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        attention[f"{ours}_bias"] = stacked(f"{layer}self_attn.{name}.bias").reshape(2, 4, 5)
    attention["out_bias"] = stacked(f"{layer}self_attn.out_proj.bias")
    mlp = {}
    for ours, name in (("up", "fc1"), ("down", "fc2")):
        mlp[ours] = stacked(f"{layer}mlp.{name}.weight").swapaxes(1, 2)
        mlp[f"{ours}_bias"] = stacked(f"{layer}mlp.{name}.bias")
    convolution = theirs[f"{tower}embeddings.patch_embedding.weight"]  # [D, channels, row, column]
    vision = {
        "patch": convolution.transpose(2, 3, 1, 0).reshape(48, 20),
        "patch_bias": theirs[f"{tower}embeddings.patch_embedding.bias"],
        "position": theirs[f"{tower}embeddings.position_embedding.weight"],
        "stack": {
            "blocks": {
                "attention": attention,
                "mlp": mlp,
                "attention_norm": norm(f"{layer}layer_norm1"),
                "mlp_norm": norm(f"{layer}layer_norm2"),
            }
        },
        "final_norm": norm(f"{tower}post_layernorm"),
    }
    linear = "model.multi_modal_projector.linear"
    out = {"weight": theirs[f"{linear}.weight"].T, "bias": theirs[f"{linear}.bias"]}
    return decoder | {"images": {"vit": vision, "projector": {"out": out}}}


@pytest.mark.parametrize("seed", [0, 1])
def test_logits_are_those_of_paligemma(seed):
    rng = np.random.default_rng(seed)
    images = rng.random((ROWS, 12, 12, 3), np.float32)
    tokens = rng.integers(0, VOCAB - 1, (ROWS, T)).astype(np.int32)
    model = random_model(seed)
    places = np.full((ROWS, P), VOCAB - 1)
    given = {
        "input_ids": torch.tensor(np.concatenate([places, tokens], 1), dtype=torch.long),
        "pixel_values": torch.tensor(images.transpose(0, 3, 1, 2)),
        "attention_mask": torch.ones(ROWS, P + T, dtype=torch.long),
        "token_type_ids": torch.tensor([[0] * P + [1] * T] * ROWS),
    }
    with torch.no_grad():
        want = model(**given).logits[:, P:].numpy()
    theirs = {name: p.detach().numpy() for name, p in model.named_parameters()}

    index = np.arange(T, dtype=np.int32)[None].repeat(ROWS, 0)
    batch = {"tokens": tokens, "targets": tokens, "segments": np.ones_like(index)}
    batch |= {"positions": index, "patches": to_patches(images, 4)}
    kind = dict(config=OURS, objective=ObjectiveConfig("captioning"), rows=ROWS, length=T)
    with layout(**kind) as laid:
        build = lambda key: VisionLanguage(
            OURS, laid.model.rules, RematConfig(), nnx.Rngs(params=key)
        )
        graph, state = nnx.split(nnx.eval_shape(build, jax.random.key(0)))
        like = nnx.to_pure_dict(state)
        params = our_params(theirs, like)
        shapes = lambda tree: jax.tree.map(lambda a: a.shape, tree)
        assert shapes(params) == shapes(like)
        run = jax.jit(lambda params, batch: nnx.merge(graph, params)(batch))
        hidden = np.asarray(run(laid.params(params), laid.placed(batch)))
    logits = hidden @ params["embedding"][:VOCAB].T
    assert want.std() > 0.1
    np.testing.assert_allclose(logits, want, rtol=0, atol=LOGITS)
