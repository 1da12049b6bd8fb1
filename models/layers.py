"""Parts of every block: weights with logical names, norms, dropout, nonlinearities.

Models are single-device code plus logical axis names. A `Param` carries its axes string as
metadata; the initialiser lays it out at rest, so no device ever holds a whole one that is divided.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from parallel.footprint import Activation, Weight
from parallel.rules import Rules
from parallel.twin import whole

Initializer = Callable[..., jax.Array]


def normal(std: float) -> Initializer:
    """Samples of N(0, std^2), laid out by `out_sharding`."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any, out_sharding: Any) -> jax.Array:
        sample = jax.random.normal(key, shape, dtype, out_sharding=out_sharding)
        return sample * jnp.asarray(std, dtype)

    return init


def constant(value: float) -> Initializer:
    """One value everywhere, laid out by `out_sharding`."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any, out_sharding: Any) -> jax.Array:
        return jnp.full(shape, value, dtype, out_sharding=out_sharding)

    return init


def weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: str, rules: Rules, init: Initializer
) -> nnx.Param:
    """A float32 parameter with logical `axes` ("embed -> heads head_dim"), laid out at rest."""
    spec = rules.at_rest(axes, shape)
    return nnx.Param(init(rngs.params(), shape, jnp.float32, out_sharding=spec), axes=axes)


def gathered(param: nnx.Param, rules: Rules) -> jax.Array:
    """A parameter that is not contracted (gain, bias, table), whole over fsdp."""
    value = param.get_value()
    shape = jax.tree.leaves(value)[0].shape
    return whole(value, rules.gathered(param.axes, shape))


def broadcast_to_rank(vector: jax.Array, ndim: int) -> jax.Array:
    """Adds leading dims of size one: rank promotion is an error here."""
    return jnp.expand_dims(vector, tuple(range(ndim - vector.ndim)))


class Norm(nnx.Module):
    """RMSNorm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467) or LayerNorm (Ba et al.
    2016, https://arxiv.org/abs/1607.06450) over the last dim, computed in float32.

    Args:
      dim: size of the last dim.
      axes: its logical name, "norm" or "head_dim".
      kind: "rms" or "layer".
      eps: added to the variance.
      plus_one: the gain is stored minus one (Gemma), so that weight decay pulls it to the identity.
    """

    def __init__(
        self,
        dim: int,
        rules: Rules,
        rngs: nnx.Rngs,
        *,
        kind: str = "rms",
        eps: float = 1e-6,
        plus_one: bool = False,
        axes: str = "norm",
    ) -> None:
        self.rules, self.kind, self.eps, self.plus_one = rules, kind, eps, plus_one
        self.gain = weight(rngs, (dim,), axes, rules, constant(0.0 if plus_one else 1.0))
        self.bias = weight(rngs, (dim,), axes, rules, constant(0.0)) if kind == "layer" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - jnp.mean(y, -1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        gain = gathered(self.gain, self.rules).astype(jnp.float32)
        y = y * broadcast_to_rank(gain + 1.0 if self.plus_one else gain, y.ndim)
        if self.bias is not None:
            bias = gathered(self.bias, self.rules).astype(jnp.float32)
            y = y + broadcast_to_rank(bias, y.ndim)
        return y.astype(x.dtype)


def norm_weights(dim: int, kind: str, axes: str = "norm") -> list[Weight]:
    """The weights of one `Norm`."""
    return [Weight((dim,), axes)] * (2 if kind == "layer" else 1)


def norm_residuals(dims: str) -> list[Activation]:
    """What the backward pass of one `Norm` keeps: its input and its result before the gain, in
    float32, and the two factors of its root.
    """
    root = " ".join(dims.split()[:-1])
    wide, narrow = Activation("norm", dims, "float32"), Activation("norm root", root, "float32")
    return [wide, wide, narrow, narrow]


def dropout(
    x: jax.Array, rate: float, key: jax.Array | None, rules: Rules, names: str
) -> jax.Array:
    """Zeroes elements with probability `rate` and scales the rest; the identity without a key.

    The mask is drawn for the global array, so it does not depend on the layout.
    """
    if rate == 0.0 or key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape, out_sharding=rules.spec(names))
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros_like(x))


# The derivative of tanh, 1 - tanh^2, as one value: JAX before 0.11.2 keeps two factors of it.
_TANH_RESIDUALS = 1 if jax.__version_info__ >= (0, 11, 2) else 2
# Tensors that the derivative of each nonlinearity keeps, its result left out; relu's is a mask.
ACTIVATION_RESIDUALS = {"gelu": 3, "gelu_tanh": 3 + _TANH_RESIDUALS, "silu": 3, "relu": 1}

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def residual_std(std: float, layers: int) -> float:
    """Standard deviation of the 2L projections that add to the residual stream (GPT-2)."""
    return std / math.sqrt(2 * layers)
