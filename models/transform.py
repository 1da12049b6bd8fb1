"""A dense layer and a nonlinearity, then perhaps a norm: before a loss head, or as a pooler.

Both are of BERT (Devlin et al. 2019, https://arxiv.org/abs/1810.04805).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from models.block import norm_of
from models.config import ModelConfig
from models.layers import (
    ACTIVATION_RESIDUALS,
    ACTIVATIONS,
    broadcast_to_rank,
    constant,
    gathered,
    norm_residuals,
    norm_weights,
    normal,
    weight,
)
from parallel.einsum import einsum
from parallel.footprint import Activation, Weight
from parallel.rules import Rules


class HeadTransform(nnx.Module):
    """x_BTD -> x_BTD, both in the residual stream's layout: dense, `config.activation`, norm."""

    def __init__(self, config: ModelConfig, rules: Rules, rngs: nnx.Rngs) -> None:
        self.rules, self.activation = rules, config.activation
        self.dense = Dense(config, rules, rngs)
        self.norm = norm_of(config, rules, rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        h_BTD = self.dense(x_BTD, "batch residual_seq act_embed")
        return self.norm(ACTIVATIONS[self.activation](h_BTD))


class Pooler(nnx.Module):
    """features [B, D] -> features [B, D]: dense and tanh."""

    def __init__(self, config: ModelConfig, rules: Rules, rngs: nnx.Rngs) -> None:
        self.dense = Dense(config, rules, rngs)

    def __call__(self, features_BD: jax.Array) -> jax.Array:
        return jnp.tanh(self.dense(features_BD, "batch act_embed"))


class Dense(nnx.Module):
    """[..., D] -> [..., D] with a bias, both laid out by the same logical names."""

    def __init__(self, config: ModelConfig, rules: Rules, rngs: nnx.Rngs) -> None:
        D, init = config.embed_dim, normal(config.init_std)
        self.rules = rules
        self.weight = weight(rngs, (D, D), "embed -> feature", rules, init)
        self.bias = weight(rngs, (D,), "norm", rules, constant(0.0))

    def __call__(self, x: jax.Array, names: str) -> jax.Array:
        equation = "btd,df->btf" if x.ndim == 3 else "bd,df->bf"
        y = einsum(equation, x, self.weight.get_value(), self.rules.spec(names))
        return y + broadcast_to_rank(gathered(self.bias, self.rules), y.ndim)


def dense_weights(config: ModelConfig) -> list[Weight]:
    """The weights of one `Dense`, or of a `Pooler`."""
    D = config.embed_dim
    return [Weight((D, D), "embed -> feature"), Weight((D,), "norm")]


def head_transform_weights(config: ModelConfig) -> list[Weight]:
    """The weights of a `HeadTransform`."""
    return dense_weights(config) + norm_weights(config.embed_dim, config.norm)


def head_transform_residuals(config: ModelConfig) -> list[Activation]:
    """What its backward pass keeps: of the product, of the nonlinearity, and of the norm."""
    dims = "batch residual_seq act_embed"
    inner = [Activation("head", dims)] * ACTIVATION_RESIDUALS[config.activation]
    return [Activation("head", dims, "product"), *inner, *norm_residuals(dims)]
