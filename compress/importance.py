"""How much heads, channels and layers matter, by their weights alone.

A unit counts as the norm of all that goes into it times the norm of what comes out: 0 where either
is, so that what does nothing goes first. Scores that saw activations (Minitron, Muralidharan et al.
2024, https://arxiv.org/abs/2407.14679) have the same shapes and take the place of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.config import ModelConfig
from training.naming import named

BLOCKS = "stack/blocks/"


@dataclass(frozen=True)
class Scores:
    """The more, the later it is removed; float64.

    Attributes:
      heads: of every query head, [blocks, N].
      channels: of every channel of the feed-forward, [blocks, F], or of experts [blocks, E, F].
      layers: [blocks].
    """

    heads: np.ndarray
    channels: np.ndarray
    layers: np.ndarray


def magnitude_scores(config: ModelConfig, params: Any) -> Scores:
    """The scores of weights, without data.

    A query head has the key and value head that it reads, as all others of its group do. A layer
    counts as its heads and channels together.
    """
    stacked = {n.removeprefix(BLOCKS): a for n, a in named(params).items() if n.startswith(BLOCKS)}
    found = [
        _of_layer(config, {name: np.asarray(a[layer], np.float64) for name, a in stacked.items()})
        for layer in range(config.blocks)
    ]
    heads, channels = (np.stack(part) for part in zip(*found, strict=True))
    return Scores(heads, channels, heads.sum(-1) + channels.reshape(len(channels), -1).sum(-1))


def _of_layer(
    config: ModelConfig, weights: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The scores of one layer's heads and channels."""
    group = config.heads // config.kv_heads
    into = _squares(weights, "attention/query", (-3, -1))
    into = into + _squares(weights, "attention/query_bias", (-1,))
    for name in ("key", "value"):
        shared = _squares(weights, f"attention/{name}", (-3, -1))
        shared = shared + _squares(weights, f"attention/{name}_bias", (-1,))
        into = into + np.repeat(shared, group, axis=-1)
    heads = np.sqrt(into * _squares(weights, "attention/out", (-2, -1)))
    into = _squares(weights, "mlp/up", (-2,)) + _squares(weights, "mlp/up_bias", ())
    into = into + _squares(weights, "mlp/gate", (-2,))
    channels = np.sqrt(into * _squares(weights, "mlp/down", (-1,)))
    return heads, channels


def _squares(weights: Mapping[str, np.ndarray], name: str, dims: tuple[int, ...]) -> Any:
    """Sums of squares over some dims; 0 of what the model does not have."""
    return np.sum(weights[name] ** 2, axis=dims) if name in weights else 0.0
