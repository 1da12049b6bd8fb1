"""IA3: a learned vector scales what a product gives, or what it is given; from one.

Liu et al. 2022, https://arxiv.org/abs/2205.05638: keys and values, and the inner features of the
feed-forward where its last product reads them. A bias is added after that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from parallel.adapted import Adapted, letters, trailing, undivided
from parallel.lora import vector_names
from parallel.stored import Door, Matrix, dense_layer


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "gain"],
    meta_fields=["matrix", "on_input"],
)
@dataclass(frozen=True)
class Rescaled(Adapted):
    """A weight whose columns, or rows, a vector scales.

    Attributes:
      gain: float32 [the other dims], or with `on_input` [contracted dims].
    """

    base: Any
    gain: Any
    matrix: Matrix
    on_input: bool
    own: ClassVar[tuple[str, ...]] = ("gain",)
    exact: ClassVar[tuple[str, ...]] = ("gain",)

    @property
    def apart(self) -> bool:
        """See `Adapted`."""
        return self.on_input

    def product(self, door: Door, equation: str, x: jax.Array, out: P, inside: P) -> jax.Array:
        """See `Composed`."""
        if self.on_input:
            x_dims, _, summed, _ = letters(equation)
            assert x_dims.endswith(summed), equation
            gain = trailing(self.gain, summed, x.ndim, jax.typeof(x).sharding.spec)
            x = (x * gain).astype(x.dtype)
        y = door(equation, x, self.frozen, out, inside)
        return y if self.on_input else self.finished(door, equation, x, y, out, inside)

    def finished(
        self, door: Door, equation: str, x: jax.Array, y: jax.Array, out: P, inside: P
    ) -> jax.Array:
        """See `Adapted`."""
        _, result, _, produced = letters(equation)
        assert result.endswith(produced), equation
        return (y * trailing(self.gain, produced, y.ndim, out)).astype(y.dtype)

    def merged(self) -> jax.Array:
        """See `Composed`."""
        matrix, gain = self.matrix, undivided(self.gain)
        first, last = matrix.contracted, len(matrix.shape)
        dims = range(first, last) if self.on_input else range(first)
        return dense_layer(self.base) * jnp.expand_dims(gain, tuple(dims))


def rescaled_axes(base: Any, matrix: Matrix, stack: str, *, on_input: bool) -> Rescaled:
    """The logical axes of base and vector."""
    names = matrix.summed if on_input else matrix.produced
    return Rescaled(base, f"{stack}{vector_names(names)}", matrix, on_input)
