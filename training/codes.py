"""The map from codes of few bits to the numbers that they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class Map:
    """Codes of numbers in [0, 1], or of [-1, 1] where it is signed: u = (code / levels) ** power.

    The roots of a power of two are exact, so that code and number need no table. A power above 1
    spends more levels on small numbers, whose relative error then is power / (2 code).

    Attributes:
      levels: the largest code.
      power: 1, 2 or 4.
      signed: codes are -levels to levels; if not, 1 to levels, stored less one: zero has no code
        (Li et al. 2023, section 4.1: a second moment of zero is divided by).
    """

    levels: int
    power: int
    signed: bool

    def encode(self, u: Array) -> Array:
        """float32 -> the nearest codes, uint8."""
        root = jnp.abs(u)
        for _ in range(self.power.bit_length() - 1):
            root = jnp.sqrt(root)
        code = jnp.round(root * self.levels)
        if self.signed:
            code = jnp.where(u < 0, -code, code) + self.levels
        else:
            code = jnp.maximum(code, 1.0) - 1.0
        return code.astype(jnp.uint8)

    def decode(self, codes: Array) -> Array:
        """uint8 -> float32."""
        numbers = codes.astype(jnp.float32)
        code = numbers - self.levels if self.signed else numbers + 1.0
        u = root = jnp.abs(code) * (1.0 / self.levels)
        for _ in range(self.power - 1):
            u = u * root
        return jnp.where(code < 0, -u, u)
