"""A weight and an adapter on it: what LoRA, DoRA and IA3 have in common.

The base is an array, or a weight in any other form; it is frozen. So the door of contractions makes
the base's product as ever, several of one input together, asks for no gradient of it and keeps
nothing but what it is at rest; an adapter adds to that product, or scales it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from parallel.contract import gathered
from parallel.mesh import PIPE
from parallel.rules import FSDP, of_one_layer
from parallel.stored import (
    Composed,
    Door,
    Matrix,
    Packed,
    dense_layer,
    is_stored,
    layer_axes,
    layers_of,
    untwinned,
)
from parallel.twin import whole

BASE = "base"  # in canonical names: what of an adapted weight is the base's


@partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["matrix"])
@dataclass(frozen=True)
class Fixed(Packed):
    """An array as the door takes what is frozen: no gradient of it is asked for."""

    array: Any
    matrix: Matrix

    def cast(self, dtype: Any) -> Fixed:
        """The array in another dtype."""
        return replace(self, array=self.array.astype(dtype))

    def main(self) -> jax.Array:
        """The array."""
        return untwinned(self.array)

    def unpacked(self, dtype: Any) -> jax.Array:
        """The array as matrices."""
        return self.matrix.flat(self.main()).astype(dtype)

    def dense(self, dtype: Any) -> jax.Array:
        """See `Packed`."""
        return gathered(self.main(), FSDP, PIPE).astype(dtype)


class Adapted(Composed):
    """A frozen base, and arrays of an adapter, which alone are trained.

    Attributes:
      base: an array (a `Twin` where the model has one) or any other `Stored` node.
      own: the fields of the adapter.
      exact: of those, the ones that stay in float32: vectors that scale, near 1 mostly.
    """

    base: Any
    own: ClassVar[tuple[str, ...]]
    exact: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def finished(
        self, door: Door, equation: str, x: jax.Array, y: jax.Array, out: P, inside: P
    ) -> jax.Array:
        """The product, of the base's y. Other arguments are those of `product`."""

    @property
    def apart(self) -> bool:
        """The base's product is of another input than the one that is given."""
        return False

    @property
    def frozen(self) -> Any:
        """The base as the door takes it."""
        base = self.base
        return base if is_stored(base) else Fixed(base, self.matrix)

    def product(self, door: Door, equation: str, x: jax.Array, out: P, inside: P) -> jax.Array:
        """See `Composed`."""
        y = door(equation, x, self.frozen, out, inside)
        return self.finished(door, equation, x, y, out, inside)

    def cast(self, dtype: Any) -> Adapted:
        """Base and adapter in another dtype, but for what is `exact`."""
        base = self.base.cast(dtype) if is_stored(self.base) else self.base.astype(dtype)
        own = {n: getattr(self, n).astype(dtype) for n in self.own if n not in self.exact}
        return self._with(base, own)

    def cut(self) -> list[Any]:
        """See `Stored`; of a base whose layers are in several forms, too."""
        return [
            self._with(base, {name: getattr(self, name)[i] for name in self.own})
            for i, base in enumerate(layers_of(self.base))
        ]

    def cut_axes(self, layers: int) -> list[Any]:
        """See `Stored`."""
        own = {name: of_one_layer(getattr(self, name)) for name in self.own}
        return [self._with(base, own) for base in layer_axes(self.base, layers)]

    def _with(self, base: Any, own: dict[str, Any]) -> Any:
        return replace(self, base=base, **own)  # type: ignore[type-var]


def base_name(name: str) -> str:
    """The canonical name in the base's model, of an array of the base in the adapted one."""
    return "/".join(part for part in name.split("/") if part != BASE)


def undivided(array: Any) -> jax.Array:
    """An adapter's array in float32, whole on every device: to merge it."""
    return jax.reshard(untwinned(array), P()).astype(jnp.float32)


def column_norms(matrix: Matrix, layer: Any) -> jax.Array:
    """The norm over the contracted dims of one layer's weight, float32 [the other dims]."""
    w = jnp.square(dense_layer(layer))
    return jnp.sqrt(jnp.sum(w, tuple(range(matrix.contracted))))


def letters(equation: str) -> tuple[str, str, str, str]:
    """(dims of x, of the result, those of the weight that are summed, those that are produced)."""
    inputs, result = equation.split("->")
    x_dims, w_dims = inputs.split(",")
    summed = "".join(d for d in w_dims if d not in result)
    produced = "".join(d for d in w_dims if d in result)
    assert w_dims == summed + produced, equation
    return x_dims, result, summed, produced


def trailing(vector: Any, dims: str, ndim: int, spec: P) -> jax.Array:
    """A vector over the last dims of an array of `ndim` dims laid out as `spec`.

    Args:
      vector: [dims], in float32.
      dims: its letters, to tell their number.
    """
    laid = whole(vector, P(*spec[ndim - len(dims) :]))
    return jnp.expand_dims(laid, tuple(range(ndim - len(dims))))
