"""What goes into a matrix while a layer runs: sums over tokens that calibration is made of.

The door of contractions hands a `Watched` weight its input; what is summed comes out of the same
trace that the layer runs in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from parallel.contract import by_device
from parallel.stored import Composed, Door, is_stored

BINS = 2048  # of |x|: the exponent of a float32 and the 3 first bits of its mantissa
_SHIFT = 20  # of the bits that are left out


class Inputs(NamedTuple):
    """Sums over the tokens that count of a matrix's inputs x [K], float32.

    Attributes:
      moment: sum of x x^T, [K, K].
      sizes: sum of |x|, [K].
      largest: the largest |x|, [K].
      histogram: how many |x| are in each bin of `edges()`, [BINS].
      tokens: how many were summed.
    """

    moment: Any
    sizes: Any
    largest: Any
    histogram: Any
    tokens: Any

    def plus(self, other: Inputs) -> Inputs:
        """Those of both."""
        return Inputs(
            self.moment + other.moment,
            self.sizes + other.sizes,
            jnp.maximum(self.largest, other.largest),
            self.histogram + other.histogram,
            self.tokens + other.tokens,
        )


def edges() -> np.ndarray:
    """The lower end of each bin, and the upper end of the last one, float64 [BINS + 1]."""
    bits = (np.arange(BINS, dtype=np.int64) << _SHIFT).astype(np.int32)
    with np.errstate(invalid="ignore"):
        lower = bits.view(np.float32).astype(np.float64)
    return np.append(np.where(np.isfinite(lower), lower, np.inf), np.inf)


class Recorder:
    """The inputs that matrices of one trace got: `names` says whose each of `found` is."""

    def __init__(self, counted_BT: jax.Array) -> None:
        self.counted_BT = counted_BT
        self.found: list[Inputs] = []
        self.names: list[list[str]] = []
        self._seen: list[tuple[jax.Array, str]] = []

    def record(self, name: str, equation: str, x: jax.Array) -> None:
        """Sums once where several matrices have one input."""
        x_dims = equation.partition(",")[0]
        summed = "".join(d for d in x_dims if d not in equation.partition("->")[2])
        for i, (other, dims) in enumerate(self._seen):
            if other is x and dims == summed:
                self.names[i].append(name)
                return
        self._seen.append((x, summed))
        self.names.append([name])
        self.found.append(inputs_of(x, x_dims, summed, self.counted_BT))


def inputs_of(x: jax.Array, x_dims: str, summed: str, counted_BT: jax.Array) -> Inputs:
    """The sums of one array; `summed` are the letters of K among `x_dims`, which are its last."""
    assert x_dims.endswith(summed), (x_dims, summed)
    spec = tuple(jax.typeof(x).sharding.spec)[:2]
    x = jax.reshard(x, P(*spec)).astype(jnp.float32)
    x_BTK = x.reshape(*x.shape[:2], -1)
    counts_BT = (jax.reshard(counted_BT, P(*spec)) > 0).astype(jnp.float32)
    x_BTK = x_BTK * counts_BT[:, :, None]
    size_BTK = jnp.abs(x_BTK)
    bins = (jax.lax.bitcast_convert_type(size_BTK, jnp.int32) >> _SHIFT) & (BINS - 1)
    return Inputs(
        jnp.einsum("btk,btj->kj", x_BTK, x_BTK, out_sharding=P()),
        jnp.einsum("btk->k", size_BTK, out_sharding=P()),
        jax.reshard(jnp.max(size_BTK, (0, 1)), P()),
        _histogram(bins),
        jax.reshard(jnp.sum(counts_BT), P()),
    )


def _histogram(bins: jax.Array) -> jax.Array:
    """How many are in each bin, of integers that may be divided over devices."""
    rows = jax.vmap(lambda row: jnp.bincount(row.reshape(-1), length=BINS))
    spec = tuple(jax.typeof(bins).sharding.spec)
    local = by_device(lambda b: rows(b), (P(*spec),), P(spec[0], None))
    return jax.reshard(jnp.sum(local(bins).astype(jnp.float32), 0), P())


@partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=["recorder", "name"])
@dataclass(frozen=True)
class Watched(Composed):
    """A weight whose inputs are summed."""

    weight: Any
    recorder: Recorder
    name: str

    def cast(self, dtype: Any) -> Watched:
        """The weight in another dtype."""
        weight = self.weight
        cast = weight.cast(dtype) if is_stored(weight) else weight.astype(dtype)
        return replace(self, weight=cast)

    def product(self, door: Door, equation: str, x: jax.Array, out: P, inside: P) -> jax.Array:
        """See `Composed`."""
        self.recorder.record(self.name, equation, x)
        return door(equation, x, self.weight, out, inside)
