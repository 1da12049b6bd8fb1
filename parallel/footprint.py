"""Tensors by their logical names, and what a device holds of them: no array and no trace.

Layers declare their weights and what their backward pass keeps as these, beside their code; the
layout's rules say how each is divided, as they do for the arrays themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jax.sharding import PartitionSpec

from parallel.rules import STAGED, Rules, is_stacked

ITEM = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4, "bool": 1}
ITEM |= dict.fromkeys(("int8", "uint8", "float8_e4m3fn"), 1)  # codes


class Weight(NamedTuple):
    """A parameter: its shape and logical axes ("embed -> mlp")."""

    shape: tuple[int, ...]
    axes: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def stacked(self, layers: int, stack: str = STAGED) -> Weight:
        """The same weight of L layers as one; `stack` is the logical name of that dim."""
        return Weight((layers, *self.shape), f"{stack} {self.axes}")


class Activation(NamedTuple):
    """A tensor of the forward pass: what it is, its logical dims, its dtype.

    Attributes:
      name: a name of `parallel.remat.TENSORS` where it has one.
      dims: "batch seq act_mlp".
      dtype: "compute" for the compute dtype, "product" for that in which products read it.
    """

    name: str
    dims: str
    dtype: str = "compute"


def elements(weight: Weight, spec: PartitionSpec, rules: Rules, *, tiled: bool = False) -> int:
    """Elements of a weight on one device under a partition of `rules`.

    Args:
      tiled: count what a TPU stores: see `tiled_size`.
    """
    shape = list(weight.shape)
    for dim, entry in enumerate(spec):
        axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        shape[dim] //= rules.size(axes)
    stacked = 1 if is_stacked(weight.axes) else 0
    return tiled_size(shape, stacked) if tiled else math.prod(shape)


def tiled_size(shape: Sequence[int], stacked: int = 0) -> int:
    """Elements that an array takes in a TPU's memory: two of its dims are padded to (8, 128), or of
    fewer rows to (4, 128), (2, 128) or (1, 128).

    XLA lays out the two dims that waste least (https://openxla.org/xla/tiled_layout); the leading
    `stacked` dims are not among them. Arrays of less than two dims are not padded to speak of.
    """
    size = math.prod(shape)
    inner = range(stacked, len(shape))
    rows = [min(8, 2 ** max(0, dim - 1).bit_length()) for dim in shape]
    padded = [
        size
        // (shape[i] * shape[j])
        * (-(-shape[i] // rows[i]) * rows[i] * -(-shape[j] // 128) * 128)
        for i in inner
        for j in inner
        if i != j
    ]
    return min(padded, default=size)


def activation_bytes(
    tensors: Iterable[Activation], sizes: Mapping[str, int], rules: Rules, dtypes: Mapping[str, str]
) -> int:
    """Bytes of tensors on one device.

    Args:
      sizes: logical dim -> its size over all devices.
      rules: the layout.
      dtypes: what "compute" and "product" stand for.
    """
    total = 0
    table = dict(rules.table)
    for tensor in tensors:
        dtype = dtypes.get(tensor.dtype, tensor.dtype)
        count = 1
        for dim in tensor.dims.split():
            count *= -(-sizes[dim] // rules.size(table.get(dim, ())))
        total += count * ITEM[dtype]
    return total
