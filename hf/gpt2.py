"""GPT-2: LayerNorm, learned positions, biases, query, key and value in one projection.

Names and keys are those of `GPT2LMHeadModel` of https://github.com/huggingface/transformers. Its
projections are `Conv1D`: weights are [in, out], as ours.
"""

from __future__ import annotations

from typing import Any

from hf.family import Family, Link
from hf.keys import Keys
from models.config import ModelConfig

ACTIVATIONS = {  # the first of two is the one that is written
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}


def read(keys: Keys) -> dict[str, Any]:
    """The fields of a `GPT2LMHeadModel`."""
    keys.only("scale_attn_weights", True)
    keys.only("scale_attn_by_inverse_layer_idx", False)
    keys.only("add_cross_attention", False)
    width, heads = keys.size("n_embd"), keys.size("n_head")
    if width % heads:
        raise keys.refused("n_head", f"does not divide n_embd = {width}")
    return {
        "vocab_size": keys.size("vocab_size"),
        "layers": keys.size("n_layer"),
        "embed_dim": width,
        "mlp_dim": keys.size("n_inner", 4 * width),
        "heads": heads,
        "kv_heads": heads,
        "head_dim": width // heads,
        "norm": "layer",
        "norm_position": "pre",
        "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
        "norm_plus_one": False,
        "positions": "learned",
        "max_length": keys.size("n_positions", 1024),
        "rope_scaling": "none",
        "rope_factor": 1.0,
        "rope_local_theta": 0.0,
        "activation": keys.choice("activation_function", ACTIVATIONS, "gelu_new"),
        "gated": False,
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
        "query_scale": 0.0,
        "attention_softcap": 0.0,
        "logit_softcap": 0.0,
        "window": 0,
        "pattern": ("global",),
        "tied": keys.truth("tie_word_embeddings", True),
        "embed_scale": False,
    }


def write(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a GPT-2."""
    return {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_layer": config.layers,
        "n_embd": config.embed_dim,
        "n_inner": config.mlp_dim,
        "n_head": config.heads,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": next(
            theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation
        ),
        "tie_word_embeddings": config.tied,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
        "initializer_range": config.init_std,
    }


def links(config: ModelConfig) -> list[Link]:
    """Where the parameters are."""
    block, layer = "stack/blocks/", "transformer.h.{}."
    found = [
        Link("embedding", "transformer.wte.weight"),
        Link("position", "transformer.wpe.weight"),
    ]
    norms = {
        "final_norm": "transformer.ln_f",
        f"{block}attention_norm": f"{layer}ln_1",
        f"{block}mlp_norm": f"{layer}ln_2",
    }
    for ours, theirs in norms.items():
        found += [Link(f"{ours}/gain", f"{theirs}.weight"), Link(f"{ours}/bias", f"{theirs}.bias")]
    for part, name in enumerate(("query", "key", "value")):
        ours, theirs = f"{block}attention/{name}", f"{layer}attn.c_attn"
        found.append(Link(ours, f"{theirs}.weight", part=part, parts=3))
        found.append(Link(f"{ours}_bias", f"{theirs}.bias", part=part, parts=3))
    projections = {
        f"{block}attention/out": f"{layer}attn.c_proj",
        f"{block}mlp/up": f"{layer}mlp.c_fc",
        f"{block}mlp/down": f"{layer}mlp.c_proj",
    }
    for ours, theirs in projections.items():
        found += [Link(ours, f"{theirs}.weight"), Link(f"{ours}_bias", f"{theirs}.bias")]
    if not config.tied:
        found.append(Link("head_weight", "lm_head.weight", transposed=True))
    return found


FAMILIES = (
    Family(
        "GPT2LMHeadModel",
        read,
        write,
        links,
        prefix="transformer.",  # the files of 2019 were saved without it
        ignored=(r".*\.attn\.bias", r".*\.attn\.masked_bias"),  # masks
    ),
)
