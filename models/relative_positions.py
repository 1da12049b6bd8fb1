"""Relative positions as a bias of the scores, by bucket of distance and by head.

Raffel et al. 2020 (T5), section 2.1, https://arxiv.org/abs/1910.10683: distances up to a number
have a bucket each, longer ones share buckets that widen as their logarithm does. One table is read
by all layers of a stack.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.config import ModelConfig
from models.layers import gathered, normal, weight
from parallel.footprint import Weight
from parallel.rules import Rules


class RelativePositions(nnx.Module):
    """A table of a bias for each bucket and head."""

    def __init__(self, config: ModelConfig, rules: Rules, rngs: nnx.Rngs) -> None:
        self.config, self.rules = config, rules
        shape = config.relative_buckets, config.heads
        self.table = weight(rngs, shape, "bucket -> heads", rules, normal(config.init_std))

    def bias(self, length: int) -> jax.Array:
        """What is added to the scores of self-attention, float32 [N, T, T].

        Float32, for it is the sum over layers of its gradients that goes back into the table.
        """
        buckets_TT = jnp.asarray(buckets_of(self.config, length))
        (heads,) = self.rules.spec("act_heads")
        table = gathered(self.table, self.rules).astype(jnp.float32)
        bias_TTN = table.at[buckets_TT].get(out_sharding=jax.P(None, None, heads))
        return jnp.transpose(bias_TTN, (2, 0, 1))


def buckets_of(config: ModelConfig, length: int) -> np.ndarray:
    """The bucket of every key for every query, int32 [T, T].

    Documents of a row are whole, so that the distance in the row is that in the document. An
    encoder has half of the buckets for keys after the query; in a decoder those, which a prefix
    alone sees, share the bucket of distance 0.
    """
    distance = (
        np.arange(length)[None, :] - np.arange(length)[:, None]
    )  # of the key, after the query
    buckets = config.relative_buckets
    if config.causal:
        back, first = np.maximum(-distance, 0), np.zeros_like(distance)
    else:
        buckets //= 2
        back, first = np.abs(distance), np.where(distance > 0, buckets, 0)
    exact = buckets // 2
    # float32 as in the published models: at a border the next bucket begins where theirs does.
    ratio = np.log(np.maximum(back, 1).astype(np.float32) / np.float32(exact))
    wide = (
        ratio / np.float32(math.log(config.relative_distance / exact)) * np.float32(buckets - exact)
    )
    far = np.minimum(exact + wide.astype(np.int32), buckets - 1)
    return (first + np.where(back < exact, back, far)).astype(np.int32)


def relative_weights(config: ModelConfig) -> list[Weight]:
    """The weights of one `RelativePositions`, if the model has them."""
    shape = config.relative_buckets, config.heads
    return [Weight(shape, "bucket -> heads")] * (config.positions == "relative")
