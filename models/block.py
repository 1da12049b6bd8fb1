"""One layer: attention, attention over a source if there is one, and feed-forward, each around the
residual stream.
"""

from __future__ import annotations

import jax
from flax import nnx

from models.config import ModelConfig
from models.cross_attention import (
    CrossAttention,
    cross_attention_residuals,
    cross_attention_weights,
)
from models.experts import Experts, experts_residuals, experts_weights
from models.feed_forward import FeedForward, feed_forward_residuals, feed_forward_weights
from models.layers import Norm, dropout, norm_residuals, norm_weights
from models.projections import projection_weights
from models.rows import Rows
from models.self_attention import SelfAttention, self_attention_residuals
from models.stack import Stack
from models.virtual_keys import virtual_weights
from parallel.footprint import Activation, Weight
from parallel.remat import RematConfig, tag
from parallel.rules import STAGED, Rules

RESIDUAL = "batch residual_seq act_embed"


class Block(nnx.Module):
    """x_BTD -> (x_BTD in the residual stream's layout, float32 sums of a router's losses).

    Norms stand before each sublayer (pre), after each sum (post, Vaswani et al. 2017,
    https://arxiv.org/abs/1706.03762), or before and after each sublayer (sandwich, Gemma).
    """

    def __init__(self, config: ModelConfig, rules: Rules, rngs: nnx.Rngs) -> None:
        def norm() -> Norm:
            return norm_of(config, rules, rngs)

        self.config, self.rules = config, rules
        self.attention = SelfAttention(config, rules, rngs)
        mixture = config.experts.number > 0
        self.mlp = (Experts if mixture else FeedForward)(config, rules, rngs)
        self.attention_norm, self.mlp_norm = norm(), norm()
        sandwich = config.norm_position == "sandwich"
        self.attention_post_norm = norm() if sandwich else None
        self.mlp_post_norm = norm() if sandwich else None
        crosses = config.cross != "none"
        self.cross = CrossAttention(config, rules, rngs) if crosses else None
        self.cross_norm = norm() if crosses else None
        self.cross_post_norm = norm() if crosses and sandwich else None

    def __call__(
        self, x_BTD: jax.Array, rows: Rows, key: jax.Array | None = None, *, local: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        post = self.config.norm_position == "post"
        crosses = self.cross is not None
        attention_key, mlp_key, *cross_key = (
            (None, None, None) if key is None else jax.random.split(key, 3 if crosses else 2)
        )

        h_BTD = tag(x_BTD if post else self.attention_norm(x_BTD), "attention_norm")
        y_BTD = self.attention(h_BTD, rows, attention_key, local=local)
        if self.attention_post_norm is not None:
            y_BTD = self.attention_post_norm(y_BTD)
        x_BTD = self.attention_norm(x_BTD + y_BTD) if post else x_BTD + y_BTD

        if self.cross is not None and self.cross_norm is not None:
            h_BTD = tag(x_BTD if post else self.cross_norm(x_BTD), "cross_norm")
            y_BTD = self.cross(h_BTD, rows, cross_key[0])
            if self.cross_post_norm is not None:
                y_BTD = self.cross_post_norm(y_BTD)
            x_BTD = self.cross_norm(x_BTD + y_BTD) if post else x_BTD + y_BTD

        h_BTD = tag(x_BTD if post else self.mlp_norm(x_BTD), "mlp_norm")
        sums: dict[str, jax.Array] = {}
        if isinstance(self.mlp, Experts):
            assert rows.segments is not None
            y_BTD, sums = self.mlp(h_BTD, rows.segments, rows.weights)
        else:
            y_BTD = self.mlp(h_BTD)
        y_BTD = dropout(y_BTD, self.config.dropout, mlp_key, self.rules, RESIDUAL)
        if self.mlp_post_norm is not None:
            y_BTD = self.mlp_post_norm(y_BTD)
        return self.mlp_norm(x_BTD + y_BTD) if post else x_BTD + y_BTD, sums


def norm_of(config: ModelConfig, rules: Rules, rngs: nnx.Rngs) -> Norm:
    """A norm of the residual stream."""
    return Norm(
        config.embed_dim,
        rules,
        rngs,
        kind=config.norm,
        eps=config.norm_eps,
        plus_one=config.norm_plus_one,
    )


def final_norm_of(config: ModelConfig, rules: Rules, rngs: nnx.Rngs) -> Norm | None:
    """The norm after the last block; post-norm blocks end in one already."""
    return None if config.norm_position == "post" else norm_of(config, rules, rngs)


def stack_of(
    config: ModelConfig, rules: Rules, remat: RematConfig, rngs: nnx.Rngs, axis: str = STAGED
) -> Stack:
    """The blocks of a model; `axis` is the logical name of its layers."""
    return Stack(
        lambda rngs: Block(config, rules, rngs),
        config.layers,
        rngs,
        pattern=config.pattern,
        remat=remat,
        unroll=config.unroll,
        axis=axis,
        distinct=config.distinct,
        sharing=config.sharing,
    )


def block_weights(config: ModelConfig) -> list[Weight]:
    """The weights of one `Block`."""
    crosses = config.cross != "none"
    return [
        *projection_weights(config),
        *virtual_weights(config),
        *(cross_attention_weights(config) if crosses else []),
        *(experts_weights if config.experts.number else feed_forward_weights)(config),
        *norm_weights(config.embed_dim, config.norm) * norms_of(config),
    ]


def norms_of(config: ModelConfig) -> int:
    """Norms of the residual stream in one `Block`."""
    sublayers = 3 if config.cross != "none" else 2
    return sublayers * (2 if config.norm_position == "sandwich" else 1)


def block_residuals(
    config: ModelConfig, form: str, cross_form: str = "", *, divided: bool = False
) -> list[Activation]:
    """What the backward pass of one `Block` keeps without rematerialisation.

    Args:
      form: of attention.
      cross_form: of that over a source.
      divided: whether the residual stream's sequence is.
    """
    crosses = config.cross != "none"
    sublayers = 3 if crosses else 2
    masks = [Activation("dropout", RESIDUAL, "bool")] * (sublayers if config.dropout else 0)
    return [
        *norm_residuals(RESIDUAL) * norms_of(config),
        *self_attention_residuals(config, form),
        *(cross_attention_residuals(config, cross_form, divided=divided) if crosses else []),
        *(experts_residuals if config.experts.number else feed_forward_residuals)(config),
        *masks,
    ]
