"""Weights in other forms than one array: what they have in common.

A model declares one array for each weight. What is kept at rest, scanned over and handed to the
door of contractions may be a node of several arrays instead: codes and scales, kept values and
their places, two factors, a base and an adapter. A node is a pytree, so that trees of parameters,
of their logical axes and of their layouts all have its structure, and whatever goes by leaf
(checkpoints, layouts, the scan over layers) needs to know nothing of it.

There are two kinds. A `Packed` weight can be made dense, one layer at a time, where it is used. A
`Composed` one never is: it says how it multiplies an input.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from parallel.contract import axes_of, by_device, gathered
from parallel.mesh import PIPE
from parallel.rules import FSDP, STACKS, Rules, of_one_layer
from parallel.twin import Twin

Tree = Any
SEVERAL = ("experts",)  # dims of several matrices side by side, before those that are contracted
UNDIVIDED = "group"  # a logical name that no mesh axis divides


@dataclass(frozen=True)
class Matrix:
    """A weight of one layer as matrices [K, M]: the dims that are contracted, and the others.

    Attributes:
      shape: of one layer's array.
      names: its logical axes, "heads head_dim -> embed".
    """

    shape: tuple[int, ...]
    names: str

    @classmethod
    def of(cls, shape: tuple[int, ...], names: str) -> Matrix:
        """That of one layer, of an array that may be stacked."""
        return cls(tuple(shape[1:]) if names.split()[0] in STACKS else shape, of_one_layer(names))

    @property
    def several(self) -> int:
        """Leading dims of several matrices."""
        return sum(name in SEVERAL for name in self.names.split())

    @property
    def contracted(self) -> int:
        """Dims before the arrow, without those of several matrices."""
        return len(self.names.partition("->")[0].split()) - self.several

    @property
    def lead(self) -> tuple[int, ...]:
        return self.shape[: self.several]

    @property
    def rows(self) -> int:
        """K, over which a product sums."""
        return math.prod(self.shape[self.several : self.several + self.contracted])

    @property
    def columns(self) -> int:
        """M, channels of the result."""
        return math.prod(self.shape[self.several + self.contracted :])

    @property
    def row_name(self) -> str:
        """The logical name that divides K: that of its first dim, whose parts are whole rows."""
        return self.names.replace("->", " ").split()[self.several]

    @property
    def column_name(self) -> str:
        return self.names.partition("->")[2].split()[0]

    @property
    def summed(self) -> str:
        """The logical names of the contracted dims."""
        return " ".join(self.names.partition("->")[0].split()[self.several :])

    @property
    def produced(self) -> str:
        """The logical names of the other dims."""
        return self.names.partition("->")[2].strip()

    @property
    def lead_names(self) -> str:
        return "".join(f"{name} " for name in self.names.split()[: self.several])

    def flat(self, array: jax.Array) -> jax.Array:
        """[..., *shape] -> [..., *lead, K, M]."""
        stacked = array.shape[: array.ndim - len(self.shape)]
        return array.reshape(*stacked, *self.lead, self.rows, self.columns)

    def unflat(self, array: jax.Array) -> jax.Array:
        """The inverse of `flat`."""
        stacked = array.shape[: array.ndim - len(self.lead) - 2]
        return array.reshape(*stacked, *self.shape)


class Stored(ABC):
    """A node that stands for a weight; a pytree of arrays, or of their axes, or of their specs."""

    matrix: Matrix

    @abstractmethod
    def cast(self, dtype: Any) -> Stored:
        """The same with what is computed with in `dtype`; codes and scales are as they are."""

    def cut(self) -> list[Any]:
        """A node for each layer, of a stacked one."""
        leaves = jax.tree.leaves(self)
        structure: Any = jax.tree.structure(self)
        return [structure.unflatten([a[i] for a in leaves]) for i in range(len(leaves[0]))]

    def cut_axes(self, layers: int) -> list[Any]:
        """The logical axes of each of those, of a node of axes."""
        return [jax.tree.map(of_one_layer, self)] * layers


class Packed(Stored):
    """A weight that is made dense where it is used, and frozen unless it says what is trained."""

    def trained(self) -> jax.Array | None:
        """The array whose gradient is that of the dense weight, laid out as this array."""
        return None

    def computed(self) -> Packed:
        """The same without what is only trained."""
        return self

    @abstractmethod
    def unpacked(self, dtype: Any) -> jax.Array:
        """[lead, K, M] of one layer, of arrays that are whole or a device's part."""

    @abstractmethod
    def main(self) -> jax.Array:
        """The array whose last dims are divided as K and M are."""

    def gathered(self) -> Packed:
        """The same with every array whole over fsdp and the stages."""
        return jax.tree.map(lambda a: gathered(untwinned(a), FSDP, PIPE), self, is_leaf=_is_twin)

    def dense(self, dtype: Any) -> jax.Array:
        """The weight of one layer, whole over fsdp and the stages, divided over the rest as it was.

        What travels is the packed form.
        """
        return self.gathered().laid_out(lambda node: node.unpacked(dtype))

    def laid_out(
        self, on_device: Callable[[Any], jax.Array], *, contracted: bool = True
    ) -> jax.Array:
        """What every device makes of its part of the gathered arrays, with the weight's own dims.

        Args:
          on_device: this node, of a device's part -> [lead, K, M], or [lead, M].
          contracted: whether the dims that are contracted are in it.
        """
        matrix, sizes = self.matrix, jax.sharding.get_abstract_mesh().shape
        *lead, rows, columns = _spec(self.main())
        first, middle = matrix.several, matrix.several + matrix.contracted
        entries = [*lead, *[None] * (len(matrix.shape) - len(lead))]
        entries[first], entries[middle] = rows, columns
        local = [
            size // math.prod(sizes[axis] for axis in axes_of([entry]))
            for size, entry in zip(matrix.shape, entries, strict=True)
        ]
        if not contracted:
            entries, local = (list(x[:first]) + list(x[middle:]) for x in (entries, local))
        specs = jax.tree.map(lambda a: P(*_spec(a)), self)
        return by_device(lambda node: on_device(node).reshape(local), (specs,), P(*entries))(self)


class Coded(Packed):
    """A packed weight that inputs can meet as codes.

    Attributes:
      inputs: "" or a form in which inputs are multiplied: "int8", "fp8".
      limit: float32 [1], the largest |x| of an input that is not cut off, where inputs are codes
        with one scale; None: each token has its own.
    """

    inputs: str
    limit: Any

    @abstractmethod
    def coded(self) -> tuple[jax.Array, jax.Array]:
        """Codes of one layer with the weight's own dims, and the scale of each channel, with those
        that are not contracted.
        """


class Composed(Stored):
    """A weight that is not formed to compute with."""

    def merged(self) -> jax.Array:
        """The array of one layer that it stands for, of arrays that are whole.

        Of what lives for one trace alone there is none.
        """
        raise AssertionError(f"{type(self).__name__} is never kept")

    @abstractmethod
    def product(self, door: Door, equation: str, x: jax.Array, out: P, inside: P) -> jax.Array:
        """`jnp.einsum(equation, x, weight)` laid out as `out`, of x laid out as `inside` first.

        Args:
          door: `parallel.einsum.einsum`, for products with what this one is made of.
        """


Door = Callable[..., jax.Array]


def is_stored(node: Any) -> bool:
    """Whether a node of a tree stands for one weight."""
    return isinstance(node, Stored)


def cast(tree: Tree, dtype: Any) -> Tree:
    """A tree of parameters in another dtype, but for codes and scales."""
    return jax.tree.map(
        lambda node: node.cast(dtype) if is_stored(node) else node.astype(dtype),
        tree,
        is_leaf=is_stored,
    )


def layers_of(node: Any) -> list[Any]:
    """A weight of each layer, of a stacked one."""
    return node.cut() if is_stored(node) else [node[i] for i in range(len(node))]


def layer_axes(axes: Any, layers: int) -> list[Any]:
    """The logical axes of each of `layers_of`."""
    return axes.cut_axes(layers) if is_stored(axes) else [of_one_layer(axes)] * layers


def untwinned(array: jax.Array | Twin) -> jax.Array:
    """What is computed with."""
    return array.whole if isinstance(array, Twin) else array


def differentiable(weight: Any) -> jax.Array | None:
    """What of a weight is trained, if it is an array, a `Twin` or packed."""
    if isinstance(weight, Packed):
        return weight.trained()
    return weight.part if isinstance(weight, Twin) else weight


def computed(weight: Any) -> jax.Array | Packed:
    """The same without its part that is only differentiated."""
    return weight.computed() if isinstance(weight, Packed) else untwinned(weight)


def usable(weight: Any, dtype: Any) -> jax.Array:
    """The array to compute with, of a weight that is an array, a `Twin` or packed."""
    return weight.dense(dtype) if isinstance(weight, Packed) else untwinned(weight)


@jax.jit
def dense_layer(node: Any) -> jax.Array:
    """The array of one layer's weight, in float32 and not divided."""
    if isinstance(node, Packed):
        return jax.reshard(node.dense("float32"), P())
    if not is_stored(node):
        return jax.reshard(untwinned(node), P()).astype(jnp.float32)
    return jax.reshard(node.merged(), P()).astype(jnp.float32)


def aligned_names(matrix: Matrix, rules: Rules, units: int) -> tuple[str, str]:
    """The logical names of K and M at rest, or undivided ones where parts would not be whole.

    Args:
      units: into which K comes: groups, bytes; a device's part is a whole number of them.
    """

    def name_of(name: str, size: int) -> str:
        axes = tuple(axis for axis in rules.axes(name) if axis != FSDP)
        return name if size % rules.size(axes) == 0 else UNDIVIDED

    return name_of(matrix.row_name, units), name_of(matrix.column_name, matrix.columns)


def whole_dims(matrix: Matrix, array: jax.Array) -> jax.Array:
    """An array of weights, undivided, as [..., K, M] in float32."""
    return matrix.flat(jnp.asarray(jax.reshard(array, P()), jnp.float32))


def _is_twin(node: Any) -> bool:
    return isinstance(node, Twin)


def _spec(array: jax.Array) -> tuple[Any, ...]:
    spec = tuple(jax.typeof(array).sharding.spec)
    return spec + (None,) * (array.ndim - len(spec))
