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
        index = np.arange(length)
        buckets_TT = jnp.asarray(buckets_of(self.config, index[None, :] - index[:, None]))
        (heads,) = self.rules.spec("act_heads")
        bias_TTN = self._table().at[buckets_TT].get(out_sharding=jax.P(None, None, heads))
        return jnp.transpose(bias_TTN, (2, 0, 1))

    def bias_of(self, q_time_BT: jax.Array, slots: int) -> jax.Array:
        """The same for queries at other places of each row and keys 0 to `slots`, of which those
        after the query are hidden: float32 [B, N, T, S].
        """
        batch, heads = self.rules.spec("batch act_heads")
        back = jnp.asarray(buckets_of(self.config, -np.arange(slots)))
        distance_BTS = q_time_BT[:, :, None] - jnp.arange(slots)[None, None]
        spec = jax.P(batch, None, None)
        buckets_BTS = back.at[jnp.clip(distance_BTS, 0, slots - 1)].get(out_sharding=spec)
        bias_BTSN = self._table().at[buckets_BTS].get(out_sharding=jax.P(*spec, heads))
        return jnp.transpose(bias_BTSN, (0, 3, 1, 2))

    def _table(self) -> jax.Array:
        return gathered(self.table, self.rules).astype(jnp.float32)


def buckets_of(config: ModelConfig, distance: np.ndarray) -> np.ndarray:
    """The bucket of each distance of a key, int32; below 0 where it stands before the query.

    Documents of a row are whole, so that the distance in the row is that in the document. An
    encoder has half of the buckets for keys after the query; in a decoder those, which a prefix
    alone sees, share the bucket of distance 0.
    """
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
