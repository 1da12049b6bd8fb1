"""A weight as two factors: x W ~ (x A) B, with r < KM / (K + M) columns of A."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from parallel.rules import Rules
from parallel.stored import Composed, Door, Matrix, untwinned

INNER = "z"  # the letter of the rank in equations, which no model uses


@partial(jax.tree_util.register_dataclass, data_fields=["into", "out_of"], meta_fields=["matrix"])
@dataclass(frozen=True)
class LowRank(Composed):
    """Two factors, trained as any weights.

    Attributes:
      into: [contracted dims, r].
      out_of: [r, the other dims].
    """

    into: Any
    out_of: Any
    matrix: Matrix

    def cast(self, dtype: Any) -> LowRank:
        """Both factors in another dtype."""
        return replace(self, into=self.into.astype(dtype), out_of=self.out_of.astype(dtype))

    def merged(self) -> jax.Array:
        """See `Composed`."""
        into, out_of = (jax.reshard(untwinned(a), P()) for a in (self.into, self.out_of))
        return jnp.tensordot(into, out_of, 1)

    def product(self, door: Door, equation: str, x: jax.Array, out: P, inside: P) -> jax.Array:
        """See `Composed`; where K is divided, the sum over devices is of r numbers a token."""
        return through(door, equation, x, self.into, self.out_of, out, inside)


def through(
    door: Door,
    equation: str,
    x: jax.Array,
    into: Any,
    out_of: Any,
    out: P,
    inside: P,
    scale: float | jax.Array = 1.0,
) -> jax.Array:
    """`(scale x A) B` for an equation of `x W`.

    Args:
      scale: a number, or [batch, r]: of every row of the batch, its first dim, its own.
    """
    inputs, result = equation.split("->")
    x_dims, w_dims = inputs.split(",")
    kept = [d for d in x_dims if d in result]
    summed = [d for d in w_dims if d not in result]
    produced = [d for d in w_dims if d in result]
    inner = "".join(kept) + INNER
    narrow = P(*[inside[x_dims.index(d)] for d in kept], None)
    h = door(f"{x_dims},{''.join(summed)}{INNER}->{inner}", x, into, narrow, inside)
    if isinstance(scale, jax.Array):
        h = h * jnp.expand_dims(scale, tuple(range(1, h.ndim - 1))).astype(h.dtype)
    elif scale != 1.0:
        h = h * scale  # here it is r numbers a token
    return door(f"{inner},{INNER}{''.join(produced)}->{result}", h, out_of, out, narrow)


def low_rank_axes(matrix: Matrix, stack: str, rules: Rules) -> LowRank:
    """The logical axes of both factors."""
    del rules
    before, _, after = matrix.names.partition(" -> ")
    return LowRank(f"{stack}{before} -> rank", f"{stack}rank -> {after}", matrix)


def factor_shapes(matrix: Matrix, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of both factors of one layer."""
    assert not matrix.several, matrix
    return (
        (*matrix.shape[: matrix.contracted], rank),
        (rank, *matrix.shape[matrix.contracted :]),
    )


def largest_rank(matrix: Matrix) -> int:
    """The largest r whose factors are smaller than the matrix."""
    rows, columns = matrix.rows, matrix.columns
    return (rows * columns - 1) // (rows + columns)
