"""Numbers as codes and scales: integers, NormalFloat and float8, and how they lie in bytes.

All of it goes by matrices [..., K, M] and scales down the columns: one for each channel M, or one
for each group of rows of a channel. `q = clip(round(w / s))`, `w ~ q s`, with s from the range: a
symmetric b-bit code reaches (2^(b-1) - 1/2) s on either side, so that its largest bucket is used
whole (as in qwix). Elementwise but for the largest of a group: no layout changes a bit of it.

NF4 (Dettmers et al. 2023, QLoRA, https://arxiv.org/abs/2305.14314): quantiles of a normal
distribution, with a scale for each group, itself in 8 bits with a scale for every 256 of a row.
float8 (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433): e4m3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np

NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
SECOND = 256  # scales of a row that share one of the second level
TINY = float(np.sqrt(np.finfo(np.float32).tiny))  # below it a scale is taken to be of zeros
FLOAT8 = jnp.float8_e4m3fn


@dataclass(frozen=True)
class Code:
    """How one number is written.

    Attributes:
      kind: "int", "nf4" or "fp8".
      bits: of a code.
      group: rows that share a scale; 0: all rows of a channel.
    """

    kind: str
    bits: int
    group: int

    @property
    def limit(self) -> float:
        """The largest |w| / s."""
        if self.kind == "int":
            return 2 ** (self.bits - 1) - 0.5
        return 1.0 if self.kind == "nf4" else float(jnp.finfo(FLOAT8).max)

    @property
    def scale_dtype(self) -> str:
        """That of a channel float32; of a group, of which there are many, float16."""
        return "float16" if self.group and self.kind != "nf4" else "float32"

    @property
    def per_unit(self) -> int:
        """Rows that lie together in whole bytes."""
        return {8: 1, 4: 2, 3: 8, 2: 4}[self.bits]

    def groups(self, rows: int) -> int:
        return rows // (self.group or rows)


def scales_of(
    code: Code,
    w: jax.Array,
    clip: jax.Array | float = 1.0,
    *,
    over: tuple[str, ...] = (),
) -> jax.Array:
    """Scales [..., G, M] of a matrix [..., K, M], in `code.scale_dtype`.

    Args:
      clip: the part of the range that is covered; a scalar, or for each scale.
      over: mesh axes whose devices have parts of each channel's rows, where `w` is such a part.
    """
    *lead, rows, columns = w.shape
    groups = code.groups(rows)
    largest = jnp.max(jnp.abs(w.reshape(*lead, groups, rows // groups, columns)), axis=-2)
    if over:
        assert not code.group, code
        largest = jax.lax.pmax(largest, over)
    scales = largest * jnp.asarray(clip, jnp.float32) / code.limit
    scales = jnp.where(scales < TINY, of_zeros(code), scales)
    if code.scale_dtype == "float16":  # not to become zero or infinite there
        scales = jnp.clip(scales, 2.0**-24, 65504.0)
    return scales.astype(code.scale_dtype)


def of_zeros(code: Code) -> float:
    """The scale of a group of zeros: any would do, and NF4's second level is to know it."""
    return TINY if code.kind == "nf4" else 1.0


def encode(code: Code, w: jax.Array, scales: jax.Array) -> jax.Array:
    """Codes [..., K, M] of a matrix: int8 (of NF4 0 to 15), or float8."""
    x = w / spread(scales.astype(jnp.float32), w.shape[-2])
    if code.kind == "nf4":
        # The nearest level: how many midpoints of neighbours lie below.
        middles = (NF4[1:] + NF4[:-1]) / 2
        return sum(
            ((x > middle).astype(jnp.int8) for middle in middles), jnp.zeros(x.shape, jnp.int8)
        )
    if code.kind == "fp8":
        return jnp.clip(x, -code.limit, code.limit).astype(FLOAT8)
    half = 2 ** (code.bits - 1)
    return jnp.clip(jnp.round(x), -half, half - 1).astype(jnp.int8)


def decode(code: Code, codes: jax.Array, scales: jax.Array, dtype: str = "float32") -> jax.Array:
    """The matrix [..., K, M] that codes stand for."""
    if code.kind == "nf4":
        values = jnp.asarray(NF4)[codes.astype(jnp.int32)]
    else:
        values = codes.astype(jnp.float32)
    return (values * spread(scales.astype(jnp.float32), codes.shape[-2])).astype(dtype)


def spread(scales: jax.Array, rows: int) -> jax.Array:
    """[..., G, M] -> [..., K, M], each scale for its rows."""
    *lead, groups, columns = scales.shape
    if groups in (1, rows):
        return scales
    wide = jnp.broadcast_to(scales[..., None, :], (*lead, groups, rows // groups, columns))
    return wide.reshape(*lead, rows, columns)


def pack(code: Code, codes: jax.Array) -> jax.Array:
    """Codes [..., K, M] in bytes [..., K bits / 8, M]: whole ones of neighbouring rows.

    Float8 as bare bytes: XLA:CPU makes wider floats of those of all layers at once, where a loop
    takes one layer of them.
    """
    if code.kind == "fp8":
        return jax.lax.bitcast_convert_type(codes, jnp.uint8)
    if code.bits == 8:
        return codes
    *lead, rows, columns = codes.shape
    unsigned = (codes.astype(jnp.int32) & (2**code.bits - 1)).astype(jnp.uint8)
    units = unsigned.reshape(*lead, rows // code.per_unit, code.per_unit, columns)
    each = [units[..., i, :] for i in range(code.per_unit)]
    if code.bits == 3:  # a byte for each bit of eight rows
        planes = [
            _together([((unit >> bit) & 1) << i for i, unit in enumerate(each)]) for bit in range(3)
        ]
    else:
        planes = [_together([unit << code.bits * i for i, unit in enumerate(each)])]
    return jnp.stack(planes, axis=-2).reshape(*lead, rows * code.bits // 8, columns)


def unpack(code: Code, packed: jax.Array) -> jax.Array:
    """The inverse of `pack`: int8 codes, of NF4 0 to 15, or float8."""
    if code.kind == "fp8":
        return jax.lax.bitcast_convert_type(packed, FLOAT8)
    if code.bits == 8:
        return packed
    *lead, byte_rows, columns = packed.shape
    rows = byte_rows * 8 // code.bits
    if code.bits == 3:
        planes = packed.reshape(*lead, rows // 8, 3, columns)
        bits = [planes[..., bit, :] for bit in range(3)]
        each = [_together([((b >> i) & 1) << bit for bit, b in enumerate(bits)]) for i in range(8)]
    else:
        each = [(packed >> code.bits * i) & (2**code.bits - 1) for i in range(code.per_unit)]
    units = jnp.stack(each, axis=-2)
    codes = units.reshape(*lead, rows, columns).astype(jnp.int8)
    if code.kind == "nf4":
        return codes
    half = 2 ** (code.bits - 1)
    return jnp.where(codes >= half, codes - 2 * half, codes)


def second_level(scales: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """NF4's scales [..., G, M] as int8, a float32 scale for every 256 of a row, and a mean.

    Scales are positive: their mean is taken off first. Those of zeros do not count, and become it.
    """
    *lead, groups, columns = scales.shape
    blocks = math.ceil(columns / SECOND)
    counts = scales > TINY
    number = jnp.maximum(jnp.sum(counts, axis=(-2, -1)), 1)
    mean = (jnp.sum(jnp.where(counts, scales, 0.0), axis=(-2, -1)) / number)[..., None]
    centred = jnp.where(counts, scales - mean[..., None], 0.0)
    padded = jnp.pad(centred, [(0, 0)] * (scales.ndim - 1) + [(0, blocks * SECOND - columns)])
    largest = jnp.max(jnp.abs(padded.reshape(*lead, groups, blocks, SECOND)), axis=-1)
    step = jnp.where(largest < TINY, 1.0, largest / 127)
    codes = jnp.round(centred / wide(step, columns))
    return jnp.clip(codes, -127, 127).astype(jnp.int8), step, mean


def through_second_level(scales: jax.Array) -> jax.Array:
    """What is left of NF4's scales [..., G, M] after `second_level`."""
    codes, step, mean = second_level(scales)
    return codes.astype(jnp.float32) * wide(step, scales.shape[-1]) + mean[..., None]


def wide(step: jax.Array, columns: int) -> jax.Array:
    """A number for every 256 columns [..., G, M / 256] as one for each [..., G, M]."""
    return jnp.repeat(step, SECOND, axis=-1)[..., :columns]


def _together(parts: list[jax.Array]) -> jax.Array:
    """Bytes of parts that do not overlap."""
    return reduce(jnp.bitwise_or, parts)
