"""Self-attention of a layer: projections, positions, the attention core, output projection.

Grouped-query attention after Ainslie et al. 2023, https://arxiv.org/abs/2305.13245; query-key norm
after Henry et al. 2020, https://arxiv.org/abs/2010.04245.
"""

from __future__ import annotations

import jax
from flax import nnx

from models.attention import attention, attention_residuals
from models.config import ModelConfig
from models.layers import dropout, norm_residuals
from models.positions import rotate
from models.projections import HEADS, INSIDE, KV_HEADS, Projections
from models.rows import Rows
from models.virtual_keys import virtual_keys, virtual_params
from parallel.footprint import Activation
from parallel.remat import tag
from parallel.rules import Rules


class SelfAttention(Projections):
    """x_BTD -> y_BTD, both in the residual stream's layout.

    Where the model learns keys and values before every row (`models.virtual_keys`), queries see
    those, too. `local` layers see `config.window` keys and turn by their own rotary theta.
    """

    def __init__(self, config: ModelConfig, rules: Rules, rngs: nnx.Rngs) -> None:
        super().__init__(config, rules, rngs)
        self.prefix_key, self.prefix_value = virtual_params(config, rules, rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        rows: Rows,
        key: jax.Array | None = None,
        *,
        local: bool = False,
    ) -> jax.Array:
        config, rules = self.config, self.rules
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, ("query", "key", "value"))
        if config.positions == "rope":
            rope = config.rope(local=local)
            q_BTNH, k_BTKH = (rotate(x, rows.positions, rope) for x in (q_BTNH, k_BTKH))
        q_BTNH, k_BTKH, v_BTKH = tag(q_BTNH, "query"), tag(k_BTKH, "key"), tag(v_BTKH, "value")

        probs_key, out_key = (None, None) if key is None else jax.random.split(key)
        window = config.window if local else None
        mask, arrays = rows.mask(causal=config.causal, window=window)
        before, bias = None, rows.bias
        if self.prefix_key is not None and self.prefix_value is not None:
            before = virtual_keys(self.prefix_key, self.prefix_value, rules, k_BTKH)
        if rows.cache is not None:
            out_BTNH = rows.cache.attend(q_BTNH, k_BTKH, v_BTKH, mask, arrays, bias, before)
            return tag(self.merge(out_BTNH), "attention_projection")
        if before is not None:
            k_BTKH, v_BTKH = before.joined(k_BTKH, v_BTKH)
            mask, arrays, bias = before.mask(mask, arrays, bias)
        out_BTNH = attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            mask,
            arrays,
            rules=rules,
            implementation=config.attention,
            scale=config.query_scale or config.head_dim**-0.5,
            softcap=config.attention_softcap or None,
            dropout_rate=0.0 if key is None else config.attention_dropout,
            dropout_key=probs_key,
            bias_NTS=bias,
        )
        y_BTD = tag(self.merge(out_BTNH), "attention_projection")
        return dropout(y_BTD, config.dropout, out_key, rules, "batch residual_seq act_embed")


def self_attention_residuals(config: ModelConfig, form: str) -> list[Activation]:
    """What its backward pass keeps without rematerialisation, with the attention core `form`."""
    norms = norm_residuals(HEADS) + norm_residuals(KV_HEADS) if config.qk_norm else []
    return [
        Activation("attention_norm", INSIDE, "product"),
        *norms,
        Activation("query", HEADS),
        Activation("key", KV_HEADS),
        Activation("value", KV_HEADS),
        *attention_residuals(form, dropped=config.attention_dropout > 0),
        Activation("attention_out", HEADS, "product"),  # input of the output projection
    ]
