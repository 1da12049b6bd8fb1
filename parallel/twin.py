"""One weight twice: to compute with, and to differentiate (`parallel/zero.py`, level 2)."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec


class Twin(NamedTuple):
    """One weight twice: `whole` is what is computed with, `part` is what is differentiated."""

    whole: jax.Array
    part: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _join(part_sharding: jax.sharding.Sharding, whole: jax.Array, part: jax.Array) -> jax.Array:
    return whole


def _join_forward(
    part_sharding: jax.sharding.Sharding, whole: jax.Array, part: jax.Array
) -> tuple[jax.Array, None]:
    return whole, None


def _join_backward(
    part_sharding: jax.sharding.Sharding, residuals: None, cotangent: jax.Array
) -> tuple[None, jax.Array]:
    return None, jax.reshard(cotangent, part_sharding)


_join.defvjp(_join_forward, _join_backward)


def joined(weight: jax.Array | Twin) -> jax.Array:
    """The array to compute with."""
    if isinstance(weight, Twin):
        return _join(jax.typeof(weight.part).sharding, weight.whole, weight.part)
    return weight


def whole(weight: jax.Array | Twin, spec: PartitionSpec) -> jax.Array:
    """The array to compute with, gathered over fsdp; `spec` is `Rules.gathered(...)`."""
    return jax.reshard(joined(weight), spec)
