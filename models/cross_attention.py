"""Attention of a decoder over another sequence: the encoded source, or an image.

Vaswani et al. 2017, section 3.2.3, https://arxiv.org/abs/1706.03762. Gated by the tanh of a scalar
that starts at 0, a layer begins as if it were not there (Alayrac et al. 2022, Flamingo,
https://arxiv.org/abs/2204.14198).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import attention, attention_residuals
from models.config import ModelConfig
from models.layers import constant, dropout, gathered, norm_residuals, weight
from models.masks import Mask, MaskArrays
from models.projections import HEADS, INSIDE, Projections, projection_weights
from models.rows import Rows
from parallel.footprint import Activation, Weight
from parallel.remat import tag
from parallel.rules import Rules

SOURCE = "batch source act_kv_heads head_dim"


class CrossAttention(Projections):
    """x_BTD, a memory [B, S, D] -> y_BTD, all in the residual stream's layout.

    A token sees what has its own segment's number in the memory, padding none, or all of it where
    the memory has no segments; of positions the sublayer knows nothing.
    """

    def __init__(self, config: ModelConfig, rules: Rules, rngs: nnx.Rngs) -> None:
        super().__init__(config, rules, rngs)
        self.gate = (
            weight(rngs, (1,), "norm", rules, constant(0.0)) if config.cross == "gated" else None
        )

    def __call__(self, x_BTD: jax.Array, rows: Rows, key: jax.Array | None = None) -> jax.Array:
        config, rules = self.config, self.rules
        assert rows.memory is not None
        features_BSD, segments_BS = rows.memory
        mask, arrays = Mask(causal=False), MaskArrays()
        if segments_BS is not None:
            mask, arrays = Mask(causal=False, segments=True), MaskArrays(rows.segments, segments_BS)

        def memory() -> list[jax.Array]:
            assert features_BSD is not None
            return self.project(features_BSD, ("key", "value"))

        (q_BTNH,) = self.project(x_BTD, ("query",))
        if rows.cache is not None:
            seen_BS = None if segments_BS is None else segments_BS > 0  # a row has one source
            return self._out(rows.cache.attend_memory(q_BTNH, memory, seen_BS))
        k_BSKH, v_BSKH = memory()
        q_BTNH = tag(q_BTNH, "cross_query")
        k_BSKH, v_BSKH = tag(k_BSKH, "cross_key"), tag(v_BSKH, "cross_value")

        probs_key, out_key = (None, None) if key is None else jax.random.split(key)
        out_BTNH = attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            mask,
            arrays,
            rules=rules,
            implementation=config.attention,
            scale=config.query_scale or config.head_dim**-0.5,
            softcap=config.attention_softcap or None,
            dropout_rate=0.0 if key is None else config.attention_dropout,
            dropout_key=probs_key,
            sublayer="cross",
        )
        return dropout(
            self._out(out_BTNH), config.dropout, out_key, rules, "batch residual_seq act_embed"
        )

    def _out(self, out_BTNH: jax.Array) -> jax.Array:
        """What is added to the residual stream, of what the heads read."""
        y_BTD = tag(self.merge(out_BTNH), "cross_projection")
        if self.gate is not None:
            y_BTD = y_BTD * jnp.tanh(gathered(self.gate, self.rules))[None, None]
        return y_BTD


def cross_attention_weights(config: ModelConfig) -> list[Weight]:
    """The weights of one `CrossAttention`."""
    return projection_weights(config) + [Weight((1,), "norm")] * (config.cross == "gated")


def cross_attention_residuals(config: ModelConfig, form: str, *, divided: bool) -> list[Activation]:
    """What its backward pass keeps without rematerialisation, with the attention core `form`.

    The memory is one array for all layers; where its sequence is `divided`, each keeps what it
    gathered of it.
    """
    norms = norm_residuals(HEADS) + norm_residuals(SOURCE) if config.qk_norm else []
    memory = [Activation("memory", "batch source act_embed", "product")] * divided
    gated = [Activation("cross_projection", "batch residual_seq act_embed")]
    return [
        Activation("cross_norm", INSIDE, "product"),
        *memory,
        *norms,
        Activation("cross_query", HEADS),
        Activation("cross_key", SOURCE),
        Activation("cross_value", SOURCE),
        *attention_residuals(form, dropped=config.attention_dropout > 0, sublayer="cross"),
        Activation("cross_out", HEADS, "product"),  # input of the output projection
        *gated * (config.cross == "gated"),
    ]
