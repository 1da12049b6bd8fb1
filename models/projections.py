"""What attention over the same or another sequence has in common: weights and their products."""

from __future__ import annotations

import jax
from flax import nnx

from models.config import ModelConfig
from models.layers import (
    Norm,
    broadcast_to_rank,
    constant,
    gathered,
    norm_weights,
    normal,
    residual_std,
    weight,
)
from parallel.einsum import einsum, einsums
from parallel.footprint import Weight
from parallel.rules import Rules

HEADS, KV_HEADS = "batch seq act_heads head_dim", "batch seq act_kv_heads head_dim"
INSIDE = "batch seq act_embed"


class Projections(nnx.Module):
    """Queries, keys and values of N and K heads, with biases and norms if the config has them, and
    the way back.
    """

    def __init__(self, config: ModelConfig, rules: Rules, rngs: nnx.Rngs) -> None:
        D, N, K, H = config.embed_dim, config.heads, config.kv_heads, config.head_dim
        init = normal(config.init_std)
        init_out = normal(residual_std(config.init_std, config.layers))
        self.config, self.rules = config, rules
        self.query = weight(rngs, (D, N, H), "embed -> heads head_dim", rules, init)
        self.key = weight(rngs, (D, K, H), "embed -> kv_heads head_dim", rules, init)
        self.value = weight(rngs, (D, K, H), "embed -> kv_heads head_dim", rules, init)
        self.out = weight(rngs, (N, H, D), "heads head_dim -> embed", rules, init_out)
        zeros = constant(0.0)
        biased = config.qkv_bias
        self.query_bias = weight(rngs, (N, H), "heads head_dim", rules, zeros) if biased else None
        self.key_bias = weight(rngs, (K, H), "kv_heads head_dim", rules, zeros) if biased else None
        self.value_bias = (
            weight(rngs, (K, H), "kv_heads head_dim", rules, zeros) if biased else None
        )
        self.out_bias = (
            weight(rngs, (D,), "norm", rules, zeros) if config.attention_out_bias else None
        )

        def head_norm() -> Norm | None:
            if not config.qk_norm:
                return None
            return Norm(
                H,
                rules,
                rngs,
                eps=config.norm_eps,
                plus_one=config.norm_plus_one,
                axes="head_dim",
            )

        self.query_norm, self.key_norm = head_norm(), head_norm()

    def project(self, x_BTD: jax.Array, names: tuple[str, ...]) -> list[jax.Array]:
        """Those of "query", "key" and "value" that are named: products of one input."""
        spec = self.rules.spec
        weights = {"query": self.query, "key": self.key, "value": self.value}
        biases = {"query": self.query_bias, "key": self.key_bias, "value": self.value_bias}
        norms = {"query": self.query_norm, "key": self.key_norm}
        products = einsums(
            "btd,dnh->btnh",
            x_BTD,
            [weights[name].get_value() for name in names],
            [spec(HEADS if name == "query" else KV_HEADS) for name in names],
            inside=spec(INSIDE),
        )
        found = []
        for name, y in zip(names, products, strict=True):
            bias, norm = biases[name], norms.get(name)
            y = y if bias is None else y + broadcast_to_rank(gathered(bias, self.rules), 4)
            found.append(y if norm is None else norm(y))
        return found

    def merge(self, out_BTNH: jax.Array) -> jax.Array:
        """y_BTD in the residual stream's layout."""
        residual = self.rules.spec("batch residual_seq act_embed")
        # g are the heads: jnp.einsum sums over dims in the order of their letters, and XLA:CPU
        # transposes a weight that has them in another order, at every token where text is made.
        y_BTD = einsum("btgh,ghd->btd", out_BTNH, self.out.get_value(), residual)
        if self.out_bias is not None:
            y_BTD = y_BTD + broadcast_to_rank(gathered(self.out_bias, self.rules), 3)
        return y_BTD


def projection_weights(config: ModelConfig) -> list[Weight]:
    """The weights of one `Projections`."""
    D, N, K, H = config.embed_dim, config.heads, config.kv_heads, config.head_dim
    kv = Weight((D, K, H), "embed -> kv_heads head_dim")
    weights = [
        Weight((D, N, H), "embed -> heads head_dim"),
        kv,
        kv,
        Weight((N, H, D), "heads head_dim -> embed"),
    ]
    if config.qkv_bias:
        kv_bias = Weight((K, H), "kv_heads head_dim")
        weights += [Weight((N, H), "heads head_dim"), kv_bias, kv_bias]
    if config.attention_out_bias:
        weights.append(Weight((D,), "norm"))
    if config.qk_norm:
        weights += norm_weights(H, "rms", "head_dim") * 2
    return weights
