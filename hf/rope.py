"""Rotary positions in a config.json: `rope_theta` and `rope_scaling`, or `rope_parameters`."""

from __future__ import annotations

from typing import Any

from hf.keys import Keys
from models.config import ModelConfig


def read_rope(keys: Keys, default_theta: float = 10_000.0) -> dict[str, Any]:
    """The fields `rope_*` of a config whose layers all turn alike.

    Raises:
      ValueError: a kind of scaling that is not computed here.
    """
    keys.only("partial_rotary_factor", 1, 1.0)
    length = keys.size("max_position_embeddings", 2048)
    theta = keys.number("rope_theta", default_theta)
    scaling = keys.inside("rope_scaling") or keys.inside("rope_parameters")
    return read_scaling(scaling, theta, length)


def read_scaling(scaling: Keys | None, theta: float, length: int) -> dict[str, Any]:
    """The fields of one mapping of rotary parameters.

    Args:
      scaling: the mapping, None for plain positions.
      theta: where the mapping has none itself.
      length: where the mapping has no original length.
    """
    if scaling is None:
        return {"rope_theta": theta, "rope_scaling": "none", "rope_factor": 1.0}
    scaling.only("partial_rotary_factor", 1, 1.0)
    kinds = {"default": "none", "linear": "linear", "llama3": "llama3"}
    name = "rope_type" if "rope_type" in scaling.values else "type"
    kind = scaling.choice(name, kinds, "default")
    fields: dict[str, Any] = {
        "rope_theta": scaling.number("rope_theta", theta),
        "rope_scaling": kind,
        "rope_factor": 1.0 if kind == "none" else scaling.number("factor"),
    }
    if kind == "llama3":
        fields |= {
            "rope_low_freq_factor": scaling.number("low_freq_factor"),
            "rope_high_freq_factor": scaling.number("high_freq_factor"),
            "rope_original_length": scaling.size("original_max_position_embeddings", length),
        }
    return fields


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The keys, in the older form, which every version of `transformers` reads."""
    scaling: dict[str, Any] | None = None
    if config.rope_scaling != "none":
        scaling = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if scaling is not None and config.rope_scaling == "llama3":
        scaling |= {
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_length,
        }
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling}
