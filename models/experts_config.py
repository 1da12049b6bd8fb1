"""A mixture of experts in place of every feed-forward: one frozen dataclass."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class ExpertsConfig:
    """Experts and their router (`config.experts`); of no effect where `number` is 0.

    Attributes:
      number: of experts in a layer; 0: one dense feed-forward.
      per_token: experts that a token goes to.
      mlp_dim: inner width of an expert; 0: `config.model.mlp_dim`.
      capacity: 0: no token is dropped (MegaBlocks, https://arxiv.org/abs/2211.15841); else each
        expert takes this many times its even share of a row of the batch, and tokens beyond that
        pass it by (Switch, section 2.2, https://arxiv.org/abs/2101.03961).
      normalise: a token's weights sum to one: softmax over the chosen experts alone (Mixtral,
        https://arxiv.org/abs/2401.04088, equation 3), which is softmax over all of them, divided by
        the sum of the chosen (Qwen 3's norm_topk_prob, https://arxiv.org/abs/2505.09388).
      balance_loss: weight of the load-balancing loss of each layer (Switch, equation 4).
      z_loss: weight of the router z-loss of each layer (ST-MoE, equation 5,
        https://arxiv.org/abs/2202.08906).
    """

    number: int = 0
    per_token: int = 2
    mlp_dim: int = 0
    capacity: float = 0.0
    normalise: bool = True
    balance_loss: float = 0.01
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.number < 0 or self.number == 1:
            raise ValueError(
                f"config.experts.number = {self.number}: 2 or more, or 0 for a dense feed-forward"
            )
        if self.per_token < 1 or (self.number and self.per_token > self.number):
            raise ValueError(
                f"config.experts.per_token = {self.per_token}: from 1 to config.experts.number = "
                f"{self.number}"
            )
        for name in ("mlp_dim", "capacity", "balance_loss", "z_loss"):
            if getattr(self, name) < 0:
                raise ValueError(f"config.experts.{name} = {getattr(self, name)}: 0 (off) or more")

    def slots(self, length: int) -> int:
        """Tokens of a row of `length` that one expert takes, with a capacity."""
        return min(length, math.ceil(self.capacity * length * self.per_token / self.number))

    def without_effect(self) -> list[str]:
        """What is set and does nothing, a sentence."""
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if self.number or not changed:
            return []
        keys = ", ".join(f"config.experts.{name}" for name in changed)
        verb = "has" if len(changed) == 1 else "have"
        return [f"{keys} {verb} no effect: config.experts.number is 0"]
