"""Shapes in the text of a compiled program, and the bytes they take."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache, cached_property

TOKEN = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?|[()]")
WIDTH = re.compile(r"\d+")
TILE = re.compile(r"T((?:\([\d,*]*\))+)")
SPACE = re.compile(r"S\((\d+)\)")
BITS = {"pred": 8, "token": 0, "opaque": 0}
DEVICE, HOST = 0, 5  # memory spaces; the others of a TPU are on the chip or hold semaphores


@dataclass(frozen=True)
class Shape:
    """An array on one device, or a tuple of them.

    Attributes:
      dtype: as XLA writes it; "tuple" has `parts` and no dims.
      order: dims from the fastest in memory to the slowest.
      tile: the outer tile that the fastest dims are padded to, () for none.
      space: 0 the device's memory, 1 fast memory on a TPU's chip, 5 the host's memory.
    """

    dtype: str
    dims: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = DEVICE
    parts: tuple[Shape, ...] = ()

    @cached_property
    def leaves(self) -> tuple[Shape, ...]:
        """The arrays of a tuple in order, nested ones flattened; an array is its own leaf."""
        if self.dtype != "tuple":
            return (self,)
        return tuple(leaf for part in self.parts for leaf in part.leaves)

    @property
    def elements(self) -> int:
        """Of an array."""
        return math.prod(self.dims)

    @property
    def bits(self) -> int:
        """Of one element."""
        if self.dtype in BITS:
            return BITS[self.dtype]
        width = WIDTH.search(self.dtype)
        return int(width[0]) if width else 8

    @cached_property
    def payload(self) -> int:
        """Bytes without padding, tuples summed."""
        if self.dtype == "tuple":
            return sum(leaf.payload for leaf in self.leaves)
        return -(-self.elements * self.bits // 8)

    @cached_property
    def bytes(self) -> int:
        """Bytes with the padding of tiles, tuples summed, in whatever memory."""
        if self.dtype == "tuple":
            return sum(leaf.bytes for leaf in self.leaves)
        if not self.tile or 0 in self.dims:
            return self.payload
        physical = [self.dims[dim] for dim in reversed(self.order)]
        physical = [1] * (len(self.tile) - len(physical)) + physical
        for n, size in enumerate(reversed(self.tile), 1):
            physical[-n] = -(-physical[-n] // size) * size
        return -(-math.prod(physical) * self.bits // 8)

    @cached_property
    def device_bytes(self) -> int:
        """Bytes in the device's main memory, tuples summed."""
        return sum(leaf.bytes for leaf in self.leaves if leaf.space == DEVICE)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@cache
def parse_shape(text: str) -> Shape:
    """Reads `bf16[4,8]{1,0:T(8,128)(2,1)S(1)}`, or a tuple of such."""
    open_tuples: list[list[Shape]] = [[]]
    for token in TOKEN.finditer(text):
        if token[0] == "(":
            open_tuples.append([])
        elif token[0] == ")":
            parts = open_tuples.pop()
            open_tuples[-1].append(Shape("tuple", parts=tuple(parts)))
        else:
            open_tuples[-1].append(_array(*token.groups()))
    return open_tuples[0][0]


@cache
def _array(dtype: str, dims_text: str, layout: str | None) -> Shape:
    dims = tuple(int(n.removeprefix("<=")) for n in dims_text.split(",") if n)
    order_text, _, rest = (layout or "").partition(":")
    order = tuple(int(n) for n in order_text.split(",") if n)
    if len(order) != len(dims):
        order = tuple(reversed(range(len(dims))))
    tile, space = TILE.search(rest), SPACE.search(rest)
    # Inner tiles, (2,1) of bf16, only reorder what the outer one holds.
    outer = tile[1][1:].split(")")[0] if tile else ""
    sizes = tuple(int(n) for n in outer.split(",") if n.isdigit())
    return Shape(dtype, dims, order, sizes, int(space[1]) if space else DEVICE)
