"""Arrays kept in 8 or 4 bits: blocks of a matrix, each with a scale.

A block is a tile of a matrix, given by its shape and logical names alone, so that a checkpoint
knows of no mesh. It is a run along the last dims, as far as a power of two goes, and goes on in
dims before. Rows of tables are in no common block where that can be: tokens that are seen a
thousand times less have moments a million times smaller.

Codes lie as the matrix does. Where a mesh divides a dim inside of a block, its devices exchange the
largest numbers of their parts of it, and its scale is on all of them: values never depend on the
layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from training.codes import Map
from training.matrices import STACKED, TABLES, matrix_dims

Tree = Any


@dataclass(frozen=True)
class Coding:
    """How one kind of array is kept.

    Attributes:
      map: of its codes.
      block: numbers that share a scale, a power of two.
      bits: 8, or 4: two codes a byte.
    """

    map: Map
    block: int
    bits: int

    def layout(self, axes: str, shape: tuple[int, ...]) -> Layout:
        """Where the codes and scales of a matrix are."""
        return Layout(shape, tile_of(axes, shape, self.block), _packed_dim(axes, shape, self.bits))


# Dettmers et al. 2022 (8 bits, https://arxiv.org/abs/2110.02861) have a table in place of a power,
# with decades that halve the number of levels. The fourth power has as many decades for the second
# moment, and everywhere in them a step of 4 / code instead of from 1% to 100% of the number.
FIRST = {8: Coding(Map(127, 4, signed=True), 256, 8), 4: Coding(Map(7, 2, signed=True), 128, 4)}
# 4 bits after Li et al. 2023, https://arxiv.org/abs/2309.01507, without zero. Evenly spaced is the
# root of the second moment, which is what is divided by, and not that moment itself: the smallest
# root is then a sixteenth of a block's largest and not a quarter.
SECOND = {
    8: Coding(Map(256, 4, signed=False), 256, 8),
    4: Coding(Map(16, 2, signed=False), 128, 4),
}


def tile_of(axes: str, shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    """The size of a block in each dim of a matrix; it divides that dim.

    Blocks have `block` numbers where the matrix has so large a power of two. Where it has less than
    a quarter, divisors of another kind come as near as they can.
    """
    dims = matrix_dims(axes)
    assert dims is not None, axes
    names = axes.replace("->", " ").split()
    inside = sorted((d for side in dims for d in side), reverse=True)
    rows = [d for d in inside if names[d] in TABLES]
    order = [d for d in inside if d not in rows] or rows
    assert not any(names[d] in STACKED for d in inside), axes
    tile = [1] * len(shape)
    for dim in order:
        tile[dim] = math.gcd(shape[dim], block // math.prod(tile))
    if math.prod(tile) < block // 4:
        for dim in order:
            wanted = block / math.prod(tile)
            rest = shape[dim] // tile[dim]
            divisors = (n for n in range(1, rest + 1) if rest % n == 0)
            tile[dim] *= min(divisors, key=lambda n: abs(math.log(n / wanted)))
    return tuple(tile)


def _packed_dim(axes: str, shape: tuple[int, ...], bits: int) -> int | None:
    """The dim along which two codes are in a byte: the last even one of the matrix."""
    dims = matrix_dims(axes)
    assert dims is not None, axes
    even = [d for side in dims for d in side if shape[d] % 2 == 0]
    return max(even) if bits == 4 and even else None


def divided(
    shape: tuple[int, ...], entries: tuple[Any, ...], size: Callable[[Any], int]
) -> tuple[Any, ...]:
    """Of a partition the entries of dims that they divide.

    Args:
      entries: of a PartitionSpec, one for each dim.
      size: entry -> the number of its parts.
    """
    return tuple(e if n % size(e) == 0 else None for n, e in zip(shape, entries, strict=True))


@dataclass(frozen=True)
class Layout:
    """A matrix in blocks.

    Attributes:
      shape: of the matrix, stacked dims included.
      tile: of one block.
      packed: the dim along which codes are two in a byte, or None.
    """

    shape: tuple[int, ...]
    tile: tuple[int, ...]
    packed: int | None

    @property
    def codes(self) -> tuple[int, ...]:
        """The shape of the codes, uint8."""
        return tuple(n // 2 if i == self.packed else n for i, n in enumerate(self.shape))

    @property
    def scales(self) -> tuple[int, ...]:
        """The shape of the scales, float32."""
        return tuple(n // t for n, t in zip(self.shape, self.tile, strict=True))


def zeros(coding: Coding, axes: str, like: Array) -> dict[str, Array]:
    """The codes and scales of zeros, divided as `like` is."""
    layout, placed = coding.layout(axes, like.shape), _Placed(like)
    return {
        "codes": placed.zeros(layout.codes, jnp.uint8),
        "scales": placed.zeros(layout.scales, jnp.float32),
    }


def read(coding: Coding, axes: str, kept: dict[str, Array], like: Array) -> Array:
    """float32 numbers of the codes, divided as `like` is."""
    layout, placed = coding.layout(axes, like.shape), _Placed(like)
    codes = kept["codes"]
    if layout.packed is not None:
        k = layout.packed
        pairs = jnp.expand_dims(codes, k + 1)
        shifts = jnp.array([0, 4], jnp.uint8)
        shifts = shifts.reshape([2 if dim == k + 1 else 1 for dim in range(pairs.ndim)])
        pairs = (pairs >> shifts) & 15
        codes = _reshaped(pairs, like.shape, jax.typeof(codes).sharding)
        codes = placed.moved(codes, placed.entries)
    scales = placed.spread(kept["scales"], layout.tile)
    return coding.map.decode(codes) * scales


def write(coding: Coding, axes: str, numbers: Array) -> dict[str, Array]:
    """float32 numbers as codes and scales."""
    layout, placed = coding.layout(axes, numbers.shape), _Placed(numbers)
    scales = placed.largest(jnp.abs(numbers), layout.tile)
    whole = placed.spread(scales, layout.tile)
    codes = coding.map.encode(jnp.where(whole > 0, numbers / whole, 0.0))
    if layout.packed is not None:
        k = layout.packed
        entries = divided(layout.codes, placed.entries, placed.size)
        codes = placed.moved(codes, entries)
        pairs = placed.viewed(codes, entries, {k: 2})
        low, high = (jax.lax.index_in_dim(pairs, i, k + 1, keepdims=False) for i in (0, 1))
        codes = low | (high << 4)
    return {"codes": codes, "scales": scales}


@dataclass(frozen=True)
class _Placed:
    """How an array is divided, and what follows for arrays made of it."""

    like: Array

    @property
    def mesh(self) -> Any:
        return jax.typeof(self.like).sharding.mesh

    @property
    def entries(self) -> tuple[Any, ...]:
        spec = tuple(jax.typeof(self.like).sharding.spec)
        return spec + (None,) * (self.like.ndim - len(spec))

    def size(self, entry: Any) -> int:
        axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        if self.mesh.empty:
            return jnp.zeros(shape, dtype)
        spec = PartitionSpec(*divided(shape, self.entries, self.size))
        return jnp.zeros(shape, dtype, out_sharding=spec)

    def moved(self, array: Array, entries: tuple[Any, ...]) -> Array:
        if self.mesh.empty or tuple(jax.typeof(array).sharding.spec) == entries:
            return array
        return jax.reshard(array, PartitionSpec(*entries))

    def viewed(self, array: Array, entries: tuple[Any, ...], parts: dict[int, int]) -> Array:
        """[n / part, part] for each dim of `parts`, divided in the first of the two."""
        shape: list[int] = []
        spec: list[Any] = []
        for i, n in enumerate(array.shape):
            shape += [n // parts[i], parts[i]] if i in parts else [n]
            spec += [entries[i], None] if i in parts else [entries[i]]
        if self.mesh.empty:
            return array.reshape(shape)
        return jax.lax.reshape(array, shape, out_sharding=PartitionSpec(*spec))

    def pieces(self, tile: tuple[int, ...]) -> dict[int, int]:
        """Dim -> the part of a block in it that is on one device."""
        local = (n // self.size(e) for n, e in zip(self.like.shape, self.entries, strict=True))
        return {
            i: math.gcd(t, n) for i, (t, n) in enumerate(zip(tile, local, strict=True)) if t > 1
        }

    def largest(self, array: Array, tile: tuple[int, ...]) -> Array:
        """The largest number of every block."""
        pieces = self.pieces(tile)
        found = _maxima(self.viewed(array, self.entries, pieces), pieces)
        rest = {i: tile[i] // piece for i, piece in pieces.items() if piece != tile[i]}
        if not rest:
            return self.moved(found, self.of_scales(tile))
        # Few numbers travel: one of each piece of a block.
        entries = self.of_scales(tile)
        return _maxima(self.viewed(self.moved(found, entries), entries, rest), rest)

    def spread(self, scales: Array, tile: tuple[int, ...]) -> Array:
        """The scale of each number's block, in the shape of the matrix."""
        pieces = self.pieces(tile)
        rest = {i: tile[i] // piece for i, piece in pieces.items() if piece != tile[i]}
        entries = self.of_scales(tile)
        of_pieces = self.moved(self.repeated(scales, entries, rest), self.entries)
        return self.repeated(of_pieces, self.entries, pieces)

    def repeated(self, array: Array, entries: tuple[Any, ...], parts: dict[int, int]) -> Array:
        """Each number `parts[dim]` times in a row."""
        if not parts:
            return array
        wide = self.viewed(array, entries, dict.fromkeys(parts, 1))
        for i in parts:
            at = i + sum(other < i for other in parts) + 1
            shape = [parts[i] if d == at else n for d, n in enumerate(wide.shape)]
            wide = jnp.broadcast_to(wide, shape)
        shape = [n * parts.get(i, 1) for i, n in enumerate(array.shape)]
        if self.mesh.empty:
            return wide.reshape(shape)
        return jax.lax.reshape(wide, shape, out_sharding=PartitionSpec(*entries))

    def of_scales(self, tile: tuple[int, ...]) -> tuple[Any, ...]:
        shape = tuple(n // t for n, t in zip(self.like.shape, tile, strict=True))
        return divided(shape, self.entries, self.size)


def _maxima(viewed: Array, parts: dict[int, int]) -> Array:
    """The maximum of the second of each two dims that `viewed` made of one."""
    at = tuple(i + sum(other < i for other in parts) + 1 for i in parts)
    return jnp.max(viewed, at) if at else viewed


def _reshaped(array: Array, shape: tuple[int, ...], sharding: Any) -> Array:
    """Two dims as one, which is divided as the first of them was."""
    if sharding.mesh.empty:
        return array.reshape(shape)
    return jax.lax.reshape(array, shape, out_sharding=sharding.spec)
