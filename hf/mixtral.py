"""Mixtral: a Mistral with a mixture of experts in place of every feed-forward.

Names and keys are those of `MixtralForCausalLM` of https://github.com/huggingface/transformers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from hf.family import Family, Link
from hf.keys import Keys
from hf.llama import IGNORED, read_common, read_head_dim, write_common
from hf.llama import links as llama_links
from models.config import ModelConfig
from models.experts_config import ExpertsConfig

THETA = 1_000_000.0  # where a config.json leaves it out


def read_experts(keys: Keys, name: str, mlp_dim: int = 0, normalise: bool = True) -> ExpertsConfig:
    """Experts, their number at key `name`."""
    number, per_token = keys.size(name), keys.size("num_experts_per_tok")
    if number < 2:
        raise keys.refused(name, "should be 2 or more")
    if per_token > number:
        raise keys.refused("num_experts_per_tok", f"more than {name} = {number}")
    return ExpertsConfig(number, per_token, mlp_dim=mlp_dim, normalise=normalise)


def read(keys: Keys) -> dict[str, Any]:
    """The fields of a `MixtralForCausalLM`: every layer sees a window, or none does."""
    window = 0 if keys.get("sliding_window") is None else keys.size("sliding_window")
    return read_common(keys, THETA) | {
        "kv_heads": keys.size("num_key_value_heads", 8),
        "head_dim": read_head_dim(keys),
        "norm_eps": keys.number("rms_norm_eps", 1e-5),
        "max_length": keys.size("max_position_embeddings", 131_072),
        "window": window,
        "pattern": ("local" if window else "global",),
        "experts": read_experts(keys, "num_local_experts"),
    }


def write(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a Mixtral."""
    return write_common(config, "mixtral") | {
        "intermediate_size": config.feed_forward_dim,
        "num_local_experts": config.experts.number,
        "num_experts_per_tok": config.experts.per_token,
        "sliding_window": config.window or None,
    }


def one_by_one(block: str, names: tuple[str, str, str], config: ModelConfig) -> list[Link]:
    """A tensor for each matrix of an expert, as all published checkpoints have it.

    Args:
      block: of a layer, that holds the router and the experts.
      names: theirs of gate, up and down.
      config: the model.
    """
    theirs = f"model.layers.{{}}.{block}."
    expert = f"{theirs}experts.{{}}."
    return [
        *_others(config, theirs),
        *[
            Link(f"stack/blocks/mlp/{ours}", f"{expert}{name}.weight", transposed=True)
            for ours, name in zip(("gate", "up", "down"), names, strict=True)
        ],
    ]


def all_in_one(config: ModelConfig) -> list[Link]:
    """A tensor for all experts of a layer, gate and up in one: what transformers 5 holds, and
    writes with `save_original_format=False`.
    """
    theirs = "model.layers.{}.mlp."
    fused = f"{theirs}experts.gate_up_proj"
    return [
        *_others(config, theirs),
        Link("stack/blocks/mlp/gate", fused, transposed=True, part=0, parts=2),
        Link("stack/blocks/mlp/up", fused, transposed=True, part=1, parts=2),
        Link("stack/blocks/mlp/down", f"{theirs}experts.down_proj", transposed=True),
    ]


def _others(config: ModelConfig, theirs: str) -> list[Link]:
    """All but the experts."""
    router = Link("stack/blocks/mlp/router/router", f"{theirs}gate.weight", transposed=True)
    return [link for link in llama_links(config) if "/mlp/" not in link.ours] + [router]


FAMILIES = (
    Family(
        "MixtralForCausalLM",
        read,
        write,
        partial(one_by_one, "block_sparse_moe", ("w1", "w3", "w2")),
        ignored=IGNORED,
        other_forms=(all_in_one,),
    ),
)
