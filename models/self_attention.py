"""Self-attention of a decoder layer: projections, positions, the attention core, output projection.

Grouped-query attention after Ainslie et al. 2023, https://arxiv.org/abs/2305.13245; query-key norm
after Henry et al. 2020, https://arxiv.org/abs/2010.04245.
"""

from __future__ import annotations

import jax
from flax import nnx

from models.attention import attention, attention_residuals
from models.config import DecoderConfig
from models.layers import (
    Norm,
    broadcast_to_rank,
    constant,
    dropout,
    gathered,
    norm_residuals,
    norm_weights,
    normal,
    residual_std,
    weight,
)
from models.masks import Mask, MaskArrays
from models.positions import rotate
from parallel.einsum import einsum, einsums
from parallel.footprint import Activation, Weight
from parallel.remat import tag
from parallel.rules import Rules


class SelfAttention(nnx.Module):
    """x_BTD -> y_BTD, both in the residual stream's layout.

    `local` layers see `config.window` keys and turn by their own rotary theta.
    """

    def __init__(self, config: DecoderConfig, rules: Rules, rngs: nnx.Rngs) -> None:
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

    def __call__(
        self,
        x_BTD: jax.Array,
        segments_BT: jax.Array,
        positions_BT: jax.Array,
        key: jax.Array | None = None,
        *,
        local: bool = False,
    ) -> jax.Array:
        config, rules = self.config, self.rules
        heads = rules.spec("batch seq act_heads head_dim")
        kv_heads = rules.spec("batch seq act_kv_heads head_dim")

        q_BTNH, k_BTKH, v_BTKH = einsums(
            "btd,dnh->btnh",
            x_BTD,
            [w.get_value() for w in (self.query, self.key, self.value)],
            [heads, kv_heads, kv_heads],
            inside=rules.spec("batch seq act_embed"),
        )

        def biased(y: jax.Array, bias: nnx.Param | None) -> jax.Array:
            return y if bias is None else y + broadcast_to_rank(gathered(bias, rules), 4)

        q_BTNH = biased(q_BTNH, self.query_bias)
        k_BTKH, v_BTKH = biased(k_BTKH, self.key_bias), biased(v_BTKH, self.value_bias)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        if config.positions == "rope":
            rope = config.rope(local=local)
            q_BTNH, k_BTKH = rotate(q_BTNH, positions_BT, rope), rotate(k_BTKH, positions_BT, rope)
        q_BTNH, k_BTKH, v_BTKH = tag(q_BTNH, "query"), tag(k_BTKH, "key"), tag(v_BTKH, "value")

        probs_key, out_key = (None, None) if key is None else jax.random.split(key)
        out_BTNH = attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            Mask(causal=True, window=config.window if local else None, segments=True),
            MaskArrays(segments_BT, segments_BT),
            rules=rules,
            implementation=config.attention,
            scale=config.query_scale or config.head_dim**-0.5,
            softcap=config.attention_softcap or None,
            dropout_rate=0.0 if key is None else config.attention_dropout,
            dropout_key=probs_key,
        )
        residual = "batch residual_seq act_embed"
        y_BTD = einsum("btnh,nhd->btd", out_BTNH, self.out.get_value(), rules.spec(residual))
        if self.out_bias is not None:
            y_BTD = y_BTD + broadcast_to_rank(gathered(self.out_bias, rules), 3)
        y_BTD = tag(y_BTD, "attention_projection")
        return dropout(y_BTD, config.dropout, out_key, rules, residual)


def self_attention_weights(config: DecoderConfig) -> list[Weight]:
    """The weights of one `SelfAttention`."""
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


def self_attention_residuals(config: DecoderConfig, form: str) -> list[Activation]:
    """What its backward pass keeps without rematerialisation, with the attention core `form`."""
    heads, kv_heads = "batch seq act_heads head_dim", "batch seq act_kv_heads head_dim"
    norms = norm_residuals(heads) + norm_residuals(kv_heads) if config.qk_norm else []
    return [
        Activation("attention_norm", "batch seq act_embed", "product"),
        *norms,
        Activation("query", heads),
        Activation("key", kv_heads),
        Activation("value", kv_heads),
        *attention_residuals(form, dropped=config.attention_dropout > 0),
        Activation("attention_out", heads, "product"),  # input of the output projection
    ]
