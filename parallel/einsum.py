"""The one door for contractions with weights: it owns the output's sharding and dtype.

Quantised and low-rank weights plug in here: the door is where a weight's form is known.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from parallel.zero import Twin, joined


def einsum(equation: str, x: jax.Array, w: jax.Array | Twin, out: PartitionSpec) -> jax.Array:
    """`jnp.einsum(equation, x, w)` in the dtype of `x`, laid out as `out`.

    A weight divided over fsdp is gathered by XLA where it is used, in the forward and again in the
    backward pass: autodiff keeps the divided one.
    """
    weight = joined(w)
    assert weight.dtype == x.dtype, (equation, weight.dtype, x.dtype)
    return jnp.einsum(equation, x, weight, out_sharding=out)
