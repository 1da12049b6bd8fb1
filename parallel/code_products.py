"""Products of codes with codes: inputs are rounded where they meet a weight that is.

A scale for each token (or one for all, from calibration) and one for each channel stand before the
sum, so it is of int8 in int32, or of float8 in float32, and both scales come after it (W8A8:
Dettmers et al. 2022, LLM.int8(), section 2, https://arxiv.org/abs/2208.07339). The backward pass
knows nothing of the inputs' rounding: its gradient goes straight through (Bengio et al. 2013,
https://arxiv.org/abs/1308.3432).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from parallel.codes import FLOAT8, TINY, Code
from parallel.contract import contract
from parallel.stored import Coded

CODES = {"int8": Code("int", 8, 0), "fp8": Code("fp8", 8, 0)}
SUMS = {"int8": jnp.int32, "fp8": jnp.float32}


def multiply_codes(equation: str, x: jax.Array, weight: Coded, out: P) -> jax.Array:
    """`jnp.einsum(equation, x, weight)` of both as codes, in the dtype of x."""
    inputs, result = equation.split("->")
    x_dims, w_dims = inputs.split(",")
    codes, scale = encode_rows(x, x_dims, result, weight.inputs, weight.limit)
    w_codes, w_scale = weight.coded()
    sums = contract(equation, codes, w_codes, out, SUMS[weight.inputs])
    channels = "".join(d for d in w_dims if d in result)
    x_scale = _in_place(scale, "".join(d for d in x_dims if d in result), result)
    w_scale = _in_place(w_scale, channels, result)
    return (sums.astype(jnp.float32) * x_scale * w_scale).astype(x.dtype)


def encode_rows(
    x: jax.Array, dims: str, result: str, kind: str, limit: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Codes like x, and a float32 scale for everything that is summed in one product.

    Args:
      dims: the letters of x; those that are not in `result` are summed.
      limit: [1], of all inputs; None: of each token.
    """
    code, x = CODES[kind], x.astype(jnp.float32)
    summed = tuple(i for i, d in enumerate(dims) if d not in result)
    if limit is None:
        largest = jnp.max(jnp.abs(x), summed, keepdims=True)
    else:
        one = jnp.reshape(limit, (1,) * x.ndim)
        largest = jnp.broadcast_to(one, [1 if i in summed else n for i, n in enumerate(x.shape)])
    scale = jnp.where(largest < TINY, 1.0, largest / code.limit)
    if kind == "fp8":
        codes = jnp.clip(x / scale, -code.limit, code.limit).astype(FLOAT8)
    else:
        codes = jnp.clip(jnp.round(x / scale), -128, 127).astype(jnp.int8)
    return codes, jnp.squeeze(scale, summed)


def _in_place(array: jax.Array, dims: str, result: str) -> jax.Array:
    """An array with dims of size one for the letters that it does not have, in their order."""
    assert "".join(d for d in result if d in dims) == dims, (dims, result)
    return jnp.expand_dims(array, tuple(i for i, d in enumerate(result) if d not in dims))
