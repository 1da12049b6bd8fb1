"""Tensors by their logical names, and what a device holds of them: no array and no trace.

Layers declare their weights and what their backward pass keeps as these, beside their code; the
layout's rules say how each is divided, as they do for the arrays themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jax.sharding import PartitionSpec

from parallel.rules import Rules

ITEM = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4, "bool": 1}


class Weight(NamedTuple):
    """A parameter: its shape and logical axes ("embed -> mlp")."""

    shape: tuple[int, ...]
    axes: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def stacked(self, layers: int) -> Weight:
        """The same weight of L layers as one."""
        return Weight((layers, *self.shape), f"layers {self.axes}")


class Activation(NamedTuple):
    """A tensor of the forward pass: what it is, its logical dims, its dtype.

    Attributes:
      name: a name of `parallel.remat.TENSORS` where it has one.
      dims: "batch seq act_mlp".
      dtype: "compute" for the compute dtype.
    """

    name: str
    dims: str
    dtype: str = "compute"


def elements(weight: Weight, spec: PartitionSpec, rules: Rules) -> int:
    """Elements of a weight on one device under a partition of `rules`."""
    parts = 1
    for entry in spec:
        axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        parts *= rules.size(axes)
    return weight.size // parts


def activation_bytes(
    tensors: Iterable[Activation], sizes: Mapping[str, int], rules: Rules, compute: str
) -> int:
    """Bytes of tensors on one device.

    Args:
      sizes: logical dim -> its size over all devices.
      rules: the layout.
      compute: the compute dtype.
    """
    total = 0
    for tensor in tensors:
        dtype = compute if tensor.dtype == "compute" else tensor.dtype
        count = 1
        for dim in tensor.dims.split():
            known = dim in dict(rules.table)
            count *= -(-sizes[dim] // (rules.parts(dim) if known else 1))
        total += count * ITEM[dtype]
    return total
