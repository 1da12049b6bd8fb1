"""Positions as sinusoids: a table that is added, or a rotation of queries and keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array

SCALINGS = ("none", "linear", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (`config.model.rope_*`).

    Attributes:
      theta: base of the wavelengths, `2 pi theta ** (2 i / H)` positions.
      scaling: `none`; `linear` divides positions by `factor` (Chen et al. 2023,
        https://arxiv.org/abs/2306.15595); `llama3` slows only the long waves by `factor`
        (Llama Team 2024, https://arxiv.org/abs/2407.21783).
      factor: how much longer the context is than the one trained for.
      low_freq_factor: llama3; waves over `original_length / low_freq_factor` are slowed in full.
      high_freq_factor: llama3; waves under `original_length / high_freq_factor` not at all.
      original_length: llama3; the context trained for, in tokens.
    """

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        key = "config.model.rope_"
        if self.scaling not in SCALINGS:
            raise ValueError(
                f"{key}scaling = {self.scaling!r}: choose one of {', '.join(SCALINGS)}"
            )
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "original_length"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{key}{name} = {getattr(self, name)!r}: choose a number above 0")
        if self.scaling == "none" and self.factor != 1:
            raise ValueError(
                f"{key}factor = {self.factor} has no effect with {key}scaling = 'none'; "
                f"choose 'linear' or 'llama3', or leave it 1"
            )
        if self.scaling == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"{key}low_freq_factor = {self.low_freq_factor}: must be below "
                f"{key}high_freq_factor = {self.high_freq_factor}"
            )

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians a position turns each pair of features by, float32 [head_dim / 2].

        Raises:
          ValueError: an odd head dim.
        """
        if head_dim % 2:
            raise ValueError(
                f"config.model.head_dim = {head_dim}: rotary positions turn pairs of features; "
                f"choose an even one"
            )
        frequency = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.scaling == "linear":
            frequency = frequency / self.factor
        if self.scaling == "llama3":
            waves = self.original_length * frequency / (2 * math.pi)  # in the original context
            low, high = self.low_freq_factor, self.high_freq_factor
            kept = np.clip((waves - low) / (high - low), 0.0, 1.0)
            frequency = kept * frequency + (1.0 - kept) * frequency / self.factor
        return frequency.astype(np.float32)


def rotate(x_BTNH: Array, positions_BT: Array, config: RopeConfig) -> Array:
    """Turns queries or keys by their positions (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    Feature i is paired with i + H / 2, as in the published Llama checkpoints of Hugging Face. The
    angles are float32; the products are in the dtype of `x_BTNH`.
    """
    frequencies = jnp.asarray(config.frequencies(x_BTNH.shape[-1]))[None, None, None]
    angles_BT1F = positions_BT.astype(jnp.float32)[:, :, None, None] * frequencies
    cos, sin = jnp.cos(angles_BT1F).astype(x_BTNH.dtype), jnp.sin(angles_BT1F).astype(x_BTNH.dtype)
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def sinusoidal(positions_BT: Array, embed_dim: int) -> Array:
    """Sinusoidal positions to be added to embeddings, float32 [B, T, D].

    Feature 2i is the sine and 2i + 1 the cosine of `position / 10000 ** (2i / D)` (Vaswani et al.
    2017, https://arxiv.org/abs/1706.03762, section 3.5).

    Raises:
      ValueError: an odd width.
    """
    if embed_dim % 2:
        raise ValueError(
            f"config.model.embed_dim = {embed_dim}: sinusoidal positions come in pairs; choose an "
            f"even one"
        )
    feature = np.arange(embed_dim)
    frequency = (10000.0 ** (-(feature - feature % 2) / embed_dim)).astype(np.float32)
    angles = positions_BT.astype(jnp.float32)[:, :, None] * frequency[None, None]
    # sin(x + pi / 2) = cos(x) would lose digits at large angles.
    is_sine = jnp.asarray(feature % 2 == 0)[None, None]
    return jnp.where(is_sine, jnp.sin(angles), jnp.cos(angles))
