"""Learning rate by update number: linear warm-up, then constant, cosine or warmup-stable-decay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
import optax
from jax import Array

if TYPE_CHECKING:
    from training.optim import OptimizerConfig


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The learning rate of update number `count`, which starts at 0 and skips skipped updates.

    Warm-up takes its first step with `learning_rate / warmup_steps` (a rate of zero would waste it)
    and reaches `learning_rate` with update `warmup_steps - 1`; it may be longer than the run. Then:

    - constant: `learning_rate`.
    - cosine: half a wave down to `final_fraction * learning_rate` at `total_steps` (Loshchilov and
      Hutter 2017, https://arxiv.org/abs/1608.03983).
    - wsd: `learning_rate`, then in the last `decay_fraction * total_steps` updates a straight line
      down to `final_fraction * learning_rate` (Hu et al. 2024, https://arxiv.org/abs/2404.06395).
    """
    warmup, final = config.warmup_steps, config.final_fraction

    def since(start: float, count: Array) -> Array:
        """How much of the way from `start` to the end of the run is done, 0 to 1."""
        return jnp.clip((count - start) / max(total_steps - start, 1.0), 0.0, 1.0)

    def schedule(count: Array | int) -> Array:
        count = jnp.asarray(count, jnp.float32)
        if config.schedule == "cosine":
            done = since(warmup, count)
            fraction = final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        elif config.schedule == "wsd":
            done = since(max(warmup, total_steps * (1.0 - config.decay_fraction)), count)
            fraction = 1.0 - (1.0 - final) * done
        else:
            fraction = jnp.float32(1.0)
        return config.learning_rate * fraction * jnp.minimum(1.0, (count + 1.0) / max(warmup, 1))

    return schedule
