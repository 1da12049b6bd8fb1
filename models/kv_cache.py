"""What a decoder keeps of earlier tokens: which arrays, how large, how they are divided.

Every layer has its own arrays and every array its own buffer: stacked and scanned, the whole cache
would be copied at every token. Heads stand before tokens, so that no product transposes them.

A row of the batch has a row of a contiguous cache, a slot for each token; a layer that sees a
window has as many slots as that, written in a ring. A paged cache is a pool of blocks, of which a
row has those that its table names (Kwon et al. 2023, https://arxiv.org/abs/2309.06180); layers with
a window keep their ring. int8 has a scale for each token and head: its largest magnitude / 127.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.config import ModelConfig
from parallel.rules import Rules

ROWS, POOL = "batch act_heads seq head_dim", "act_heads batch seq head_dim"
SCALE = "float32"
INT8_MOST = 127.0


@dataclass(frozen=True)
class CacheShape:
    """The sizes of a cache.

    Attributes:
      rows: sequences at a time, over all devices.
      slots: tokens of a row, prompt and generated.
      int8: kept as int8 with scales; else in the compute dtype.
      block: tokens of a block; 0: contiguous.
      blocks: of the pool of each part of the batch.
      source: what layers attend to besides: tokens of a source, or patches of an image.
    """

    rows: int
    slots: int
    int8: bool = False
    block: int = 0
    blocks: int = 0
    source: int = 0

    @property
    def row_blocks(self) -> int:
        """Blocks of a row that is full."""
        return -(-self.slots // self.block)


class Kept(NamedTuple):
    """One array of a cache: its global shape, logical dims and dtype."""

    shape: tuple[int, ...]
    dims: str
    dtype: str


def repeats(config: ModelConfig, rules: Rules) -> int:
    """How often a K/V head is kept: where the parts of the query heads are more than those, each
    part has the one that it reads.
    """
    if rules.axes("act_kv_heads") == rules.axes("act_heads"):
        return 1
    return max(1, rules.parts("act_heads") // config.kv_heads)


def is_ring(config: ModelConfig, shape: CacheShape, *, local: bool) -> bool:
    """Whether a layer keeps a window alone."""
    return local and 0 < config.window < shape.slots


def layer_kept(
    config: ModelConfig, shape: CacheShape, rules: Rules, compute: str, *, local: bool
) -> dict[str, Kept]:
    """The arrays of one layer, by name."""
    C, H = config.kv_heads * repeats(config, rules), config.head_dim
    kept: dict[str, Kept] = {}
    if is_ring(config, shape, local=local):
        kept |= _pair(ROWS, (shape.rows, C, config.window, H), shape.int8, compute)
    elif shape.block:
        blocks = shape.blocks * rules.parts("batch")
        kept |= _pair(POOL, (C, blocks, shape.block, H), shape.int8, compute)
    else:
        kept |= _pair(ROWS, (shape.rows, C, shape.slots, H), shape.int8, compute)
    if config.cross != "none":
        sizes = shape.rows, C, shape.source, H
        pair = _pair(ROWS, sizes, False, compute)
        kept |= {f"cross_{name}": array for name, array in pair.items()}
    return kept


def _pair(dims: str, sizes: tuple[int, ...], int8: bool, compute: str) -> dict[str, Kept]:
    kept = {name: Kept(sizes, dims, "int8" if int8 else compute) for name in ("key", "value")}
    if int8:
        scale = Kept(sizes[:-1], dims.rpartition(" ")[0], SCALE)
        kept |= {f"{name}_scale": scale for name in ("key", "value")}
    return kept


def cache_kept(
    config: ModelConfig, shape: CacheShape, rules: Rules, compute: str
) -> list[dict[str, Kept]]:
    """The arrays of all layers, in order."""
    kinds = config.pattern
    return [
        layer_kept(config, shape, rules, compute, local=kinds[i % len(kinds)] == "local")
        for i in range(config.layers)
    ]


def empty_cache(kept: list[dict[str, Kept]], rules: Rules) -> list[dict[str, jax.Array]]:
    """Zeros, each device making its own part; call it under `jax.jit`."""
    return [
        {
            name: jnp.zeros(array.shape, array.dtype, out_sharding=rules.spec(array.dims))
            for name, array in layer.items()
        }
        for layer in kept
    ]


def to_int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Round-to-nearest by the last dim: int8 of the same shape, float32 scales without it."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), -1, keepdims=True), 1e-30) / INT8_MOST
    return jnp.round(x / scale).astype(jnp.int8), jnp.squeeze(scale, -1)
