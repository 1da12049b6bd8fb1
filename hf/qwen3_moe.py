"""Qwen 3 with experts: a Qwen 3 with a mixture of experts in place of every feed-forward.

Names and keys are those of `Qwen3MoeForCausalLM` of https://github.com/huggingface/transformers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from hf.family import Family
from hf.keys import Keys
from hf.llama import IGNORED, read_common, read_head_dim, write_common
from hf.mixtral import all_in_one, one_by_one, read_experts
from models.config import ModelConfig


def read(keys: Keys) -> dict[str, Any]:
    """The fields of a `Qwen3MoeForCausalLM`.

    Without experts in some layers, or with others that see all tokens, it is not computed here.
    """
    keys.only("decoder_sparse_step", 1)
    keys.only("mlp_only_layers", [])
    keys.only("shared_expert_intermediate_size", 0)
    biased = keys.truth("attention_bias", False)
    # Newer versions of transformers write the second name.
    both = ("num_experts", "num_local_experts")
    number = both[keys.get(both[0]) is None and keys.get(both[1]) is not None]
    window = _read_window(keys)
    wide, normalise = keys.size("moe_intermediate_size", 768), keys.truth("norm_topk_prob", False)
    return read_common(keys) | {
        "kv_heads": keys.size("num_key_value_heads", 4),
        "head_dim": read_head_dim(keys),
        "max_length": keys.size("max_position_embeddings", 32_768),
        "qk_norm": True,
        "qkv_bias": biased,
        "attention_out_bias": biased,
        "window": window,
        "pattern": ("local" if window else "global",),
        "experts": read_experts(keys, number, wide, normalise),
    }


def _read_window(keys: Keys) -> int:
    """Of every layer, or 0."""
    if not keys.truth("use_sliding_window", False):
        return 0
    # Versions of transformers differ in whether the layers before it see all.
    keys.only("max_window_layers", 0)
    return keys.size("sliding_window", 4096)


def write(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a Qwen 3 with experts."""
    return write_common(config, "qwen3_moe") | {
        "attention_bias": config.qkv_bias,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": config.feed_forward_dim,
        "norm_topk_prob": config.experts.normalise,
        "num_experts": config.experts.number,
        "num_experts_per_tok": config.experts.per_token,
        "use_sliding_window": config.window > 0,
        "sliding_window": config.window or None,
    }


FAMILIES = (
    Family(
        "Qwen3MoeForCausalLM",
        read,
        write,
        partial(one_by_one, "mlp", ("gate_proj", "up_proj", "down_proj")),
        ignored=IGNORED,
        other_forms=(all_in_one,),
    ),
)
