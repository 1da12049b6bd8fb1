"""Llama, Mistral and Qwen 3: RMSNorm before each sublayer, rotary positions, gated feed-forward.

Names and keys are those of `LlamaForCausalLM`, `MistralForCausalLM` and `Qwen3ForCausalLM` of
https://github.com/huggingface/transformers.
"""

from __future__ import annotations

from typing import Any

from hf.family import Family, Link, kinds_of_layers, layer_kinds
from hf.keys import Keys
from hf.rope import read_rope, write_rope
from models.config import ModelConfig

# Their word -> ours; the first of two is the one that is written.
ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
LAYER_TYPES = {"full_attention": "global", "sliding_attention": "local"}


def read_common(keys: Keys, theta: float = 10_000.0) -> dict[str, Any]:
    """What all of them have in common; `theta` is that of a config.json without one."""
    heads = keys.size("num_attention_heads")
    return {
        "vocab_size": keys.size("vocab_size"),
        "layers": keys.size("num_hidden_layers"),
        "embed_dim": keys.size("hidden_size"),
        "mlp_dim": keys.size("intermediate_size"),
        "heads": heads,
        "norm": "rms",
        "norm_position": "pre",
        "norm_eps": keys.number("rms_norm_eps", 1e-6),
        "norm_plus_one": False,
        "positions": "rope",
        "max_length": keys.size("max_position_embeddings", 2048),
        "activation": keys.choice("hidden_act", ACTIVATIONS, "silu"),
        "gated": True,
        "qkv_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "query_scale": 0.0,
        "attention_softcap": 0.0,
        "logit_softcap": 0.0,
        "window": 0,
        "pattern": ("global",),
        "tied": keys.truth("tie_word_embeddings", False),
        "embed_scale": False,
        "rope_local_theta": 0.0,
        **read_rope(keys, theta),
    }


def read_head_dim(keys: Keys) -> int:
    """Its size, or an even share of the width."""
    return keys.size("head_dim", keys.size("hidden_size") // keys.size("num_attention_heads"))


def write_common(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """What all of them have in common."""
    return {
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.layers,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_length,
        "hidden_act": activation_name(config),
        "tie_word_embeddings": config.tied,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.init_std,
        **write_rope(config),
    }


def activation_name(config: ModelConfig) -> str:
    """Their word for the nonlinearity."""
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)


def read_llama(keys: Keys) -> dict[str, Any]:
    """The fields of a `LlamaForCausalLM`."""
    keys.only("mlp_bias", False)  # it has a bias of the gate, too, for which there is no place here
    biased = keys.truth("attention_bias", False)
    return read_common(keys) | {
        "kv_heads": keys.size("num_key_value_heads", keys.size("num_attention_heads")),
        "head_dim": read_head_dim(keys),
        "qkv_bias": biased,
        "attention_out_bias": biased,
    }


def write_llama(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a Llama."""
    return write_common(config, "llama") | {"attention_bias": config.qkv_bias}


def read_mistral(keys: Keys) -> dict[str, Any]:
    """The fields of a `MistralForCausalLM`: every layer sees a window, or none does."""
    keys.only("layer_types")
    # Absent it is 4096 by their class; null is none.
    keys.seen.add("sliding_window")
    none = keys.values.get("sliding_window", 4096) is None
    window = 0 if none else keys.size("sliding_window", 4096)
    return read_common(keys) | {
        "kv_heads": keys.size("num_key_value_heads"),
        "head_dim": read_head_dim(keys),
        "window": window,
        "pattern": ("local" if window else "global",),
    }


def write_mistral(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a Mistral."""
    return write_common(config, "mistral") | {"sliding_window": config.window or None}


def read_qwen3(keys: Keys) -> dict[str, Any]:
    """The fields of a `Qwen3ForCausalLM`."""
    biased = keys.truth("attention_bias", False)
    layers = keys.size("num_hidden_layers")
    windowed = keys.truth("use_sliding_window", False)
    first = keys.get("max_window_layers", 28)
    types = keys.get("layer_types")
    if types is None:
        types = [
            "sliding_attention" if windowed and i >= first else "full_attention"
            for i in range(layers)
        ]
    window = keys.size("sliding_window", 4096) if windowed else 0
    pattern = read_pattern(keys, types, layers)
    if "local" in pattern and not window:
        raise keys.refused("layer_types", "has sliding_attention, and use_sliding_window is false")
    return read_common(keys) | {
        "kv_heads": keys.size("num_key_value_heads"),
        "head_dim": keys.size("head_dim", 128),
        "qk_norm": True,
        "qkv_bias": biased,
        "attention_out_bias": biased,
        "window": window if "local" in pattern else 0,
        "pattern": pattern,
    }


def read_pattern(keys: Keys, types: Any, layers: int) -> tuple[str, ...]:
    """The pattern of `layer_types`.

    Raises:
      ValueError: kinds of layers that are not computed here, or too many or few of them.
    """
    if not isinstance(types, list) or len(types) != layers or not set(types) <= set(LAYER_TYPES):
        words = " or ".join(LAYER_TYPES)
        raise keys.refused("layer_types", f"should be {layers} of {words}")
    return layer_kinds([LAYER_TYPES[kind] for kind in types])


def write_layer_types(config: ModelConfig) -> list[str]:
    """Their name of each layer's kind."""
    names = {ours: theirs for theirs, ours in LAYER_TYPES.items()}
    return [names[kind] for kind in kinds_of_layers(config)]


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a Qwen 3."""
    return write_common(config, "qwen3") | {
        "attention_bias": config.qkv_bias,
        "use_sliding_window": config.window > 0,
        "sliding_window": config.window or None,
        "max_window_layers": config.layers,
        "layer_types": write_layer_types(config),
    }


def links(config: ModelConfig) -> list[Link]:
    """Where the parameters are."""
    block, layer = "stack/blocks/", "model.layers.{}."
    attention, theirs = f"{block}attention/", f"{layer}self_attn."
    projections = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    found = [
        Link("embedding", "model.embed_tokens.weight"),
        Link("final_norm/gain", "model.norm.weight"),
        Link(f"{block}attention_norm/gain", f"{layer}input_layernorm.weight"),
        Link(f"{block}mlp_norm/gain", f"{layer}post_attention_layernorm.weight"),
        Link(f"{attention}out", f"{theirs}o_proj.weight", transposed=True),
    ]
    for ours, name in projections.items():
        found.append(Link(f"{attention}{ours}", f"{theirs}{name}.weight", transposed=True))
        if config.qkv_bias:
            found.append(Link(f"{attention}{ours}_bias", f"{theirs}{name}.bias"))
    if config.attention_out_bias:
        found.append(Link(f"{attention}out_bias", f"{theirs}o_proj.bias"))
    if config.qk_norm:
        found.append(Link(f"{attention}query_norm/gain", f"{theirs}q_norm.weight"))
        found.append(Link(f"{attention}key_norm/gain", f"{theirs}k_norm.weight"))
    for name in ("gate", "up", "down"):
        found.append(Link(f"{block}mlp/{name}", f"{layer}mlp.{name}_proj.weight", transposed=True))
    if not config.tied:
        found.append(Link("head_weight", "lm_head.weight", transposed=True))
    return found


IGNORED = (r".*\.rotary_emb\.inv_freq",)
FAMILIES = tuple(
    Family(architecture, read, write, links, ignored=IGNORED)
    for architecture, read, write in (
        ("LlamaForCausalLM", read_llama, write_llama),
        ("MistralForCausalLM", read_mistral, write_mistral),
        ("Qwen3ForCausalLM", read_qwen3, write_qwen3),
    )
)
