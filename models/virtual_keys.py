"""Prefix tuning: keys and values that a layer learns, of positions before every row.

Li and Liang 2021, https://arxiv.org/abs/2101.00190; without a network that makes them, P-tuning v2
(Liu et al. 2021, https://arxiv.org/abs/2110.07602). Every query sees them, whatever its document
and window, but for padding. They have no position: nothing turns them, no bias is added.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import ModelConfig
from models.layers import gathered, normal, weight
from models.masks import Mask, MaskArrays
from parallel.footprint import Weight
from parallel.rules import Rules

AXES = "virtual kv_heads head_dim"


class VirtualKeys(NamedTuple):
    """Keys and values before every row, [B, P, K, H], divided as those of its tokens."""

    k_BPKH: jax.Array
    v_BPKH: jax.Array

    def joined(self, k_BTKH: jax.Array, v_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Before the keys and values of tokens."""
        k = jnp.concatenate([self.k_BPKH, k_BTKH], 1)
        return k, jnp.concatenate([self.v_BPKH, v_BTKH], 1)

    def mask(
        self, mask: Mask, arrays: MaskArrays, bias_NTS: jax.Array | None
    ) -> tuple[Mask, MaskArrays, jax.Array | None]:
        """The mask and the bias of tokens, with these before them."""
        number = self.k_BPKH.shape[1]
        if arrays.k_segments_BS is not None:
            segments = jnp.pad(arrays.k_segments_BS, [(0, 0), (number, 0)])
            arrays = arrays._replace(k_segments_BS=segments)
        if bias_NTS is not None:
            bias_NTS = jnp.pad(bias_NTS, [(0, 0), (0, 0), (number, 0)])
        return replace(mask, before=number), arrays, bias_NTS


def virtual_params(
    config: ModelConfig, rules: Rules, rngs: nnx.Rngs
) -> tuple[nnx.Param | None, nnx.Param | None]:
    """The parameters of a layer, if the model has them."""
    if not config.prefix_length:
        return None, None
    shape, init = _shape(config), normal(config.init_std)
    return weight(rngs, shape, AXES, rules, init), weight(rngs, shape, AXES, rules, init)


def virtual_keys(
    key: nnx.Param, value: nnx.Param, rules: Rules, like_BTKH: jax.Array
) -> VirtualKeys:
    """Those of a layer for every row of a batch."""
    rows, spec = like_BTKH.shape[0], jax.typeof(like_BTKH).sharding.spec

    def of_rows(param: nnx.Param) -> jax.Array:
        x_PKH = gathered(param, rules).astype(like_BTKH.dtype)
        shape = rows, *x_PKH.shape
        return jax.lax.broadcast_in_dim(x_PKH, shape, (1, 2, 3), out_sharding=spec)

    return VirtualKeys(of_rows(key), of_rows(value))


def virtual_weights(config: ModelConfig) -> list[Weight]:
    """The weights of `virtual_params`."""
    return [Weight(_shape(config), AXES)] * (2 if config.prefix_length else 0)


def _shape(config: ModelConfig) -> tuple[int, int, int]:
    return config.prefix_length, config.kv_heads, config.head_dim
