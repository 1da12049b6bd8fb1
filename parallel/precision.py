"""Dtypes of storage, compute and sums, and the dynamic loss scale that float16 needs.

Master parameters and optimizer moments are kept in `params`, a copy in `compute` feeds the model,
and gradients of micro-steps are summed in `accumulate`. Softmax, norms, the loss and all its sums
are float32 whatever the config says; a product's partial sums are so inside the hardware's unit.
Mixed precision after Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class PrecisionConfig:
    """Dtypes by name (`config.precision`) and the schedule of the float16 loss scale.

    Attributes:
      params: master parameters and moments.
      compute: activations, the model's copy of the weights, and gradients of one micro-step.
      accumulate: the buffer that sums gradients over micro-steps.
      scale: first loss scale; used with compute float16 only.
      scale_steps: good steps in a row after which the scale doubles.
    """

    params: str = "float32"
    compute: str = "float32"
    accumulate: str = "float32"
    scale: float = 2.0**15
    scale_steps: int = 2000

    def __post_init__(self) -> None:
        for key in ("params", "compute", "accumulate"):
            if getattr(self, key) not in DTYPES:
                raise ValueError(
                    f"config.precision.{key} = {getattr(self, key)!r}: choose one of "
                    f"{', '.join(DTYPES)}"
                )
        if self.params == "float16":
            raise ValueError(
                "config.precision.params = 'float16': updates underflow in float16; "
                "keep the master copy in float32 (or bfloat16) and set config.precision.compute"
            )
        if not self.scale >= 1:
            raise ValueError(f"config.precision.scale = {self.scale}: a loss scale is at least 1")
        if self.scale_steps < 1:
            raise ValueError(f"config.precision.scale_steps = {self.scale_steps}: at least 1")

    @property
    def scaled(self) -> bool:
        """Whether the loss is scaled: float16 has too little range for gradients."""
        return self.compute == "float16"


class LossScale(NamedTuple):
    """State of dynamic loss scaling, two scalars: the factor, the good steps since it changed."""

    scale: Any
    good_steps: Any

    @staticmethod
    def init(config: PrecisionConfig) -> LossScale:
        scale = config.scale if config.scaled else 1.0
        return LossScale(jnp.float32(scale), jnp.int32(0))

    def update(self, config: PrecisionConfig, finite: jax.Array) -> LossScale:
        """Halves after an overflow, but not below 1; doubles after `scale_steps` good steps."""
        if not config.scaled:
            return self
        good = jnp.where(finite, self.good_steps + 1, 0)
        grow = good >= config.scale_steps
        scale = jnp.where(finite, jnp.where(grow, self.scale * 2, self.scale), self.scale / 2)
        return LossScale(jnp.clip(scale, 1.0, 2.0**24), jnp.where(grow, 0, good))
