"""The feed-forward: up, nonlinearity, down; gated for SwiGLU and GeGLU.

Gated forms after Shazeer 2020, https://arxiv.org/abs/2002.05202. Under tensor parallelism the up
projections are split by columns and the down projection by rows: one reduction a pass.
"""

from __future__ import annotations

import jax
from flax import nnx

from models.config import ModelConfig
from models.layers import (
    ACTIVATION_RESIDUALS,
    ACTIVATIONS,
    broadcast_to_rank,
    constant,
    gathered,
    normal,
    residual_std,
    weight,
)
from parallel.einsum import einsum, einsums
from parallel.footprint import Activation, Weight
from parallel.remat import tag
from parallel.rules import Rules


class FeedForward(nnx.Module):
    """x_BTD -> y_BTD, both in the residual stream's layout."""

    def __init__(self, config: ModelConfig, rules: Rules, rngs: nnx.Rngs) -> None:
        D, F = config.embed_dim, config.mlp_dim
        init = normal(config.init_std)
        init_down = normal(residual_std(config.init_std, config.layers))
        self.rules, self.activation = rules, config.activation
        self.up = weight(rngs, (D, F), "embed -> mlp", rules, init)
        self.gate = weight(rngs, (D, F), "embed -> mlp", rules, init) if config.gated else None
        self.down = weight(rngs, (F, D), "mlp -> embed", rules, init_down)
        zeros = constant(0.0)
        self.up_bias = weight(rngs, (F,), "mlp", rules, zeros) if config.mlp_bias else None
        self.down_bias = weight(rngs, (D,), "norm", rules, zeros) if config.mlp_bias else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        inside, act = self.rules.spec("batch seq act_embed"), self.rules.spec("batch seq act_mlp")
        residual = self.rules.spec("batch residual_seq act_embed")
        weights = [w.get_value() for w in (self.up, self.gate) if w is not None]
        up, *gate = einsums("btd,df->btf", x_BTD, weights, [act] * len(weights), inside)
        if self.up_bias is not None:
            up = up + broadcast_to_rank(gathered(self.up_bias, self.rules), 3)
        up = tag(up, "mlp_up")
        nonlinearity = ACTIVATIONS[self.activation]
        h_BTF = nonlinearity(tag(gate[0], "mlp_gate")) * up if gate else nonlinearity(up)
        h_BTF = tag(h_BTF, "mlp_act")
        y_BTD = einsum("btf,fd->btd", h_BTF, self.down.get_value(), residual)
        if self.down_bias is not None:
            y_BTD = y_BTD + broadcast_to_rank(gathered(self.down_bias, self.rules), 3)
        return tag(y_BTD, "mlp_projection")


def feed_forward_weights(config: ModelConfig) -> list[Weight]:
    """The weights of one `FeedForward`."""
    D, F = config.embed_dim, config.mlp_dim
    into, out_of = Weight((D, F), "embed -> mlp"), Weight((F, D), "mlp -> embed")
    biases = [Weight((F,), "mlp"), Weight((D,), "norm")] if config.mlp_bias else []
    return [into] * (2 if config.gated else 1) + [out_of] + biases


def feed_forward_residuals(config: ModelConfig) -> list[Activation]:
    """What its backward pass keeps without rematerialisation: inputs of the products, and of the
    nonlinearity whatever its derivative asks for.
    """
    mlp = "batch seq act_mlp"
    inner = ACTIVATION_RESIDUALS[config.activation] + (2 if config.gated else 0)
    return [
        Activation("mlp_norm", "batch seq act_embed", "product"),
        Activation("mlp_act", mlp, "product"),
        *[Activation("mlp_gate" if config.gated else "mlp_up", mlp)] * inner,
    ]
