"""LoRA: x W + (alpha / r) x A B, W frozen (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

Where W is packed codes, this is QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).
DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353) scales the columns of that sum to learned
magnitudes: m (W + (alpha / r) A B) / |W + (alpha / r) A B|, the norm over the contracted dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from parallel.adapted import Adapted, letters, trailing, undivided
from parallel.contract import axes_of, gathered, without
from parallel.low_rank import INNER, through
from parallel.mesh import PIPE
from parallel.rules import FSDP
from parallel.stored import Door, Matrix, dense_layer, untwinned

OTHER = "y"  # the letter of a second rank
TINY = float(jnp.finfo(jnp.float32).tiny)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "into", "out_of"],
    meta_fields=["matrix", "scale"],
)
@dataclass(frozen=True)
class Lora(Adapted):
    """A weight with two factors beside it.

    Attributes:
      into: A, [contracted dims, r].
      out_of: B, [r, the other dims]; from zero.
      scale: alpha / r.
    """

    base: Any
    into: Any
    out_of: Any
    matrix: Matrix
    scale: float
    own: ClassVar[tuple[str, ...]] = ("into", "out_of")

    def finished(
        self, door: Door, equation: str, x: jax.Array, y: jax.Array, out: P, inside: P
    ) -> jax.Array:
        """See `Adapted`; a sum over devices that A needs is of r numbers a token."""
        return y + through(door, equation, x, self.into, self.out_of, out, inside, self.scale)

    def merged(self) -> jax.Array:
        """See `Composed`."""
        change = jnp.tensordot(undivided(self.into), undivided(self.out_of), 1)
        return dense_layer(self.base) + self.scale * change


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "into", "out_of", "magnitude"],
    meta_fields=["matrix", "scale"],
)
@dataclass(frozen=True)
class Dora(Adapted):
    """The same with a magnitude for every column.

    Attributes:
      magnitude: m, float32 [the other dims]; from the norms of the base.
    """

    base: Any
    into: Any
    out_of: Any
    magnitude: Any
    matrix: Matrix
    scale: float
    own: ClassVar[tuple[str, ...]] = ("into", "out_of", "magnitude")
    exact: ClassVar[tuple[str, ...]] = ("magnitude",)

    def finished(
        self, door: Door, equation: str, x: jax.Array, y: jax.Array, out: P, inside: P
    ) -> jax.Array:
        """See `Adapted`; no gradient goes through the norm (section 4.3 of the paper)."""
        y = y + through(door, equation, x, self.into, self.out_of, out, inside, self.scale)
        _, result, _, produced = letters(equation)
        assert result.endswith(produced), equation
        norm = jax.lax.stop_gradient(self._norms(equation, x.dtype, out, inside))
        m = trailing(self.magnitude, produced, len(result), out)
        factor = m / jnp.expand_dims(norm, tuple(range(m.ndim - norm.ndim)))
        return (y * factor).astype(y.dtype)

    def _norms(self, equation: str, dtype: Any, out: P, inside: P) -> jax.Array:
        """|W + s A B| for every column, float32, laid out as `out` has its last dims.

        By the squares of both terms and twice their product, from W^T A and A^T A: A B, as large
        as W, is not formed.
        """
        x_dims, result, summed, produced = letters(equation)
        rows = [inside[x_dims.index(d)] for d in summed]
        columns = [without(out[result.index(d)], axes_of(rows)) for d in produced]
        w = self.frozen.dense(dtype)
        a, b = (gathered(untwinned(f), FSDP, PIPE) for f in (self.into, self.out_of))
        w, a, b = (
            jax.reshard(jax.lax.stop_gradient(value), P(*spec))
            for value, spec in (
                (w, [*rows, *columns]),
                (a, [*rows, None]),
                (b, [None, *columns]),
            )
        )
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        w_a = product(
            f"{summed}{produced},{summed}{INNER}->{produced}{INNER}",
            *(w, a),
            out_sharding=P(*columns, None),
        )
        a_a = product(
            f"{summed}{INNER},{summed}{OTHER}->{INNER}{OTHER}", a, a, out_sharding=P(None, None)
        )
        b32 = b.astype(jnp.float32)
        a_a_b = jnp.einsum(
            f"{INNER}{OTHER},{OTHER}{produced}->{INNER}{produced}",
            *(a_a, b32),
            out_sharding=P(None, *columns),
        )
        own = jnp.sum(jnp.square(w.astype(jnp.float32)), tuple(range(len(summed))))
        cross = jnp.sum(jnp.moveaxis(w_a, -1, 0) * b32, 0)
        change = jnp.sum(b32 * a_a_b, 0)
        squares = own + 2 * self.scale * cross + self.scale**2 * change
        norm = jnp.sqrt(jnp.maximum(squares, TINY))
        return jax.reshard(norm, P(*[out[result.index(d)] for d in produced]))

    def merged(self) -> jax.Array:
        """See `Composed`."""
        change = jnp.tensordot(undivided(self.into), undivided(self.out_of), 1)
        w = dense_layer(self.base) + self.scale * change
        dims = tuple(range(self.matrix.contracted))
        norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(w), dims), TINY))
        return w * jnp.expand_dims(undivided(self.magnitude) / norm, dims)


def lora_axes(base: Any, matrix: Matrix, stack: str, scale: float) -> Lora:
    """The logical axes of base and factors; the rank is undivided but for ZeRO."""
    into, out_of = factor_axes(matrix, stack)
    return Lora(base, into, out_of, matrix, scale)


def dora_axes(base: Any, matrix: Matrix, stack: str, scale: float) -> Dora:
    """The same with the magnitude."""
    into, out_of = factor_axes(matrix, stack)
    return Dora(base, into, out_of, f"{stack}{vector_names(matrix.produced)}", matrix, scale)


def vector_names(names: str) -> str:
    """The logical axes of a vector over dims of a weight: as biases have them."""
    return " ".join("norm" if name == "embed" else name for name in names.split())


def factor_axes(matrix: Matrix, stack: str) -> tuple[str, str]:
    """The logical axes of A and B; `stack` is "layers " or nothing."""
    before, _, after = matrix.names.partition(" -> ")
    return f"{stack}{before} -> rank", f"{stack}rank -> {after}"
