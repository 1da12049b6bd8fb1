"""Gemma 3, text alone: norms before and after each sublayer, local and global layers, GeGLU.

Names and keys are those of `Gemma3ForCausalLM` of https://github.com/huggingface/transformers.
Gains are stored minus one, as here.
"""

from __future__ import annotations

from typing import Any

from hf.family import Family, Link
from hf.keys import Keys
from hf.llama import ACTIVATIONS, IGNORED, activation_name, read_pattern, write_layer_types
from hf.llama import links as llama_links
from hf.rope import read_scaling, write_rope
from models.config import ModelConfig

THETA, LOCAL_THETA = 1_000_000.0, 10_000.0  # where a config.json leaves them out


def read(keys: Keys) -> dict[str, Any]:
    """The fields of a `Gemma3ForCausalLM`."""
    keys.only("use_bidirectional_attention", False)
    # Their attention does not look at it (transformers 5.23), and published models have none.
    keys.only("attn_logit_softcapping")
    biased = keys.truth("attention_bias", False)
    layers = keys.size("num_hidden_layers", 26)
    length = keys.size("max_position_embeddings", 131_072)
    every = keys.size("sliding_window_pattern", 6)
    types = keys.get("layer_types")
    if types is None:
        kinds = "full_attention", "sliding_attention"
        types = [kinds[(i + 1) % every > 0] for i in range(layers)]
    pattern = read_pattern(keys, types, layers)
    local = "local" in pattern
    window = keys.size("sliding_window", 4096)
    scale = keys.number("query_pre_attn_scalar", 256)
    if not scale > 0:
        raise keys.refused("query_pre_attn_scalar", "should be more than 0")
    fields, local_theta = _read_rope(keys, length)
    return {
        "vocab_size": keys.size("vocab_size", 262_208),
        "layers": layers,
        "embed_dim": keys.size("hidden_size", 2304),
        "mlp_dim": keys.size("intermediate_size", 9216),
        "heads": keys.size("num_attention_heads", 8),
        "kv_heads": keys.size("num_key_value_heads", 4),
        "head_dim": keys.size("head_dim", 256),
        "norm": "rms",
        "norm_position": "sandwich",
        "norm_eps": keys.number("rms_norm_eps", 1e-6),
        "norm_plus_one": True,
        "positions": "rope",
        "max_length": length,
        "activation": keys.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        "gated": True,
        "qkv_bias": biased,
        "attention_out_bias": biased,
        "mlp_bias": False,
        "qk_norm": True,
        "query_scale": scale**-0.5,
        "attention_softcap": 0.0,
        "logit_softcap": keys.number("final_logit_softcapping", 0.0),
        "window": window if local else 0,
        "pattern": pattern,
        "tied": keys.truth("tie_word_embeddings", True),
        "embed_scale": True,
        "rope_local_theta": local_theta if local else 0.0,
        **fields,
    }


def _read_rope(keys: Keys, length: int) -> tuple[dict[str, Any], float]:
    """The fields `rope_*` of the global layers, and the theta of the local ones."""
    theta = keys.number("rope_theta", THETA)
    local_theta = keys.number("rope_local_base_freq", LOCAL_THETA)
    both = keys.inside("rope_parameters")
    if both is None:
        return read_scaling(keys.inside("rope_scaling"), theta, length), local_theta
    local = read_scaling(both.inside("sliding_attention"), local_theta, length)
    if local["rope_scaling"] != "none":
        raise both.refused("sliding_attention", "not computed here; local layers are not scaled")
    return read_scaling(both.inside("full_attention"), theta, length), local["rope_theta"]


def write(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a Gemma 3."""
    scale = config.query_scale or config.head_dim**-0.5
    scalar = scale**-2
    return {
        "model_type": "gemma3_text",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.layers,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_length,
        "hidden_activation": activation_name(config),
        "attention_bias": config.qkv_bias,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.init_std,
        # A whole number for them: what is one up to rounding is written as one.
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "final_logit_softcapping": config.logit_softcap or None,
        "attn_logit_softcapping": None,
        "sliding_window": config.window or 4096,
        "layer_types": write_layer_types(config),
        "tie_word_embeddings": config.tied,
        "rope_local_base_freq": config.rope_local_theta or config.rope_theta,
        **write_rope(config),
    }


def links(config: ModelConfig) -> list[Link]:
    """Where the parameters are."""
    block, layer = "stack/blocks/", "model.layers.{}."
    norms = {
        f"{block}attention_norm/gain": "input_layernorm",
        f"{block}attention_post_norm/gain": "post_attention_layernorm",
        f"{block}mlp_norm/gain": "pre_feedforward_layernorm",
        f"{block}mlp_post_norm/gain": "post_feedforward_layernorm",
    }
    others = [link for link in llama_links(config) if link.ours not in norms]
    return others + [Link(ours, f"{layer}{theirs}.weight") for ours, theirs in norms.items()]


FAMILIES = (Family("Gemma3ForCausalLM", read, write, links, ignored=IGNORED),)
