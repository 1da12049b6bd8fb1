"""What of a model's forward pass losses are made of, before its head multiplies anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
from jax import Array

from models.tables import Head

HeadWeights = tuple[Array, ...]  # the table, and the bias if there is one


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Predictor:
    """What gives logits of tokens: see `training.losses.cross_entropy`.

    Attributes:
      x_BTD: features in compute dtype.
      table: [V, D] or [D, V].
      table_axes: which of them.
      bias: [V], or None.
      softcap: of the logits, or None.
    """

    x_BTD: Array
    table: Array
    table_axes: str = field(default="vocab -> embed", metadata=dict(static=True))
    bias: Array | None = None
    softcap: float | None = field(default=None, metadata=dict(static=True))

    @property
    def weights(self) -> HeadWeights:
        return (self.table,) if self.bias is None else (self.table, self.bias)


def predictor(head: Head, features_BTD: Array, softcap: float) -> Predictor:
    """That of a head and what it multiplies; a softcap of 0 is none."""
    return Predictor(features_BTD, head.weight, head.axes, head.bias, softcap or None)


class Features(NamedTuple):
    """A forward pass up to the head of tokens.

    Attributes:
      predictor: features and head.
      states: residual streams after the layers that were asked for, in its layout.
      added: float32, what else the loss has (tasks), weighted; None for nothing.
      sums: float32 sums to report beside those of tokens.
    """

    predictor: Predictor
    states: tuple[Array, ...]
    added: Array | None
    sums: dict[str, Array]

    def completed(self, total: Array, sums: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """The whole loss and its sums, of those of tokens."""
        return total if self.added is None else total + self.added, sums | self.sums
