"""One decoder layer: attention and feed-forward, each around the residual stream."""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import nnx

from models.config import DecoderConfig
from models.feed_forward import FeedForward, feed_forward_residuals, feed_forward_weights
from models.layers import Norm, dropout, norm_residuals, norm_weights
from models.self_attention import (
    SelfAttention,
    self_attention_residuals,
    self_attention_weights,
)
from parallel.footprint import Activation, Weight
from parallel.remat import tag
from parallel.rules import Rules

RESIDUAL = "batch residual_seq act_embed"


class Rows(NamedTuple):
    """What every layer knows of the rows of a batch, int32 [B, T] (see `data.loader`)."""

    segments: jax.Array
    positions: jax.Array


class Block(nnx.Module):
    """x_BTD -> x_BTD in the residual stream's layout.

    Norms stand before each sublayer (pre), after each sum (post, Vaswani et al. 2017,
    https://arxiv.org/abs/1706.03762), or before and after each sublayer (sandwich, Gemma).
    """

    def __init__(self, config: DecoderConfig, rules: Rules, rngs: nnx.Rngs) -> None:
        def norm() -> Norm:
            return Norm(
                config.embed_dim,
                rules,
                rngs,
                kind=config.norm,
                eps=config.norm_eps,
                plus_one=config.norm_plus_one,
            )

        self.config, self.rules = config, rules
        self.attention = SelfAttention(config, rules, rngs)
        self.mlp = FeedForward(config, rules, rngs)
        self.attention_norm, self.mlp_norm = norm(), norm()
        sandwich = config.norm_position == "sandwich"
        self.attention_post_norm = norm() if sandwich else None
        self.mlp_post_norm = norm() if sandwich else None

    def __call__(
        self, x_BTD: jax.Array, rows: Rows, key: jax.Array | None = None, *, local: bool = False
    ) -> jax.Array:
        post = self.config.norm_position == "post"
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)

        h_BTD = tag(x_BTD if post else self.attention_norm(x_BTD), "attention_norm")
        y_BTD = self.attention(h_BTD, rows.segments, rows.positions, attention_key, local=local)
        if self.attention_post_norm is not None:
            y_BTD = self.attention_post_norm(y_BTD)
        x_BTD = self.attention_norm(x_BTD + y_BTD) if post else x_BTD + y_BTD

        h_BTD = tag(x_BTD if post else self.mlp_norm(x_BTD), "mlp_norm")
        y_BTD = self.mlp(h_BTD)
        y_BTD = dropout(y_BTD, self.config.dropout, mlp_key, self.rules, RESIDUAL)
        if self.mlp_post_norm is not None:
            y_BTD = self.mlp_post_norm(y_BTD)
        return self.mlp_norm(x_BTD + y_BTD) if post else x_BTD + y_BTD


def block_weights(config: DecoderConfig) -> list[Weight]:
    """The weights of one `Block`."""
    norms = 4 if config.norm_position == "sandwich" else 2
    return [
        *self_attention_weights(config),
        *feed_forward_weights(config),
        *norm_weights(config.embed_dim, config.norm) * norms,
    ]


def block_residuals(config: DecoderConfig, form: str) -> list[Activation]:
    """What the backward pass of one `Block` keeps without rematerialisation."""
    norms = 4 if config.norm_position == "sandwich" else 2
    masks = [Activation("dropout", RESIDUAL, "bool")] * (2 if config.dropout else 0)
    return [
        *norm_residuals(RESIDUAL) * norms,
        *self_attention_residuals(config, form),
        *feed_forward_residuals(config),
        *masks,
    ]
