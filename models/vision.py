"""The vision transformer: patches of an image as tokens that all see each other.

Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929, without its class token: what wants one
feature of an image takes the mean (Zhai et al. 2021, https://arxiv.org/abs/2106.04560).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from models.block import RESIDUAL, Block, block_weights, final_norm_of, stack_of
from models.config import ModelConfig
from models.layers import (
    broadcast_to_rank,
    constant,
    dropout,
    gathered,
    norm_weights,
    normal,
    weight,
)
from models.positions import sinusoidal
from models.rows import Rows
from parallel.einsum import einsum
from parallel.footprint import Weight
from parallel.remat import RematConfig
from parallel.rules import STAGED, Rules


class ViT(nnx.Module):
    """patches [B, P, K] -> features x_BPD after the final norm.

    Args:
      config: of the ViT itself, `encoder_beside(config)` where it stands beside a decoder.
      axis: logical name of its layer axis.
    """

    def __init__(
        self,
        config: ModelConfig,
        rules: Rules,
        remat: RematConfig,
        rngs: nnx.Rngs,
        axis: str = STAGED,
    ) -> None:
        D, K = config.embed_dim, config.vision.patch_dim
        init = normal(config.init_std)
        self.config, self.rules = config, rules
        self.patch = weight(rngs, (K, D), "feature -> embed", rules, init)
        self.patch_bias = weight(rngs, (D,), "norm", rules, constant(0.0))
        self.position = (
            weight(rngs, (config.vision.patches, D), "position -> embed", rules, init)
            if config.positions == "learned"
            else None
        )
        self.stack = stack_of(config, rules, remat, rngs, axis)
        self.final_norm = final_norm_of(config, rules, rngs)

    def __call__(self, patches_BPK: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Features of every patch in compute dtype; `key` turns dropout on."""
        return self.finish(self.run_blocks(self.embed(patches_BPK, key), key))

    def embed(self, patches_BPK: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The first x_BPD of the residual stream."""
        config, rules = self.config, self.rules
        bias_D = gathered(self.patch_bias, rules)
        whole = rules.spec("batch seq act_embed")
        patches_BPK = patches_BPK.astype(bias_D.dtype)
        x_BPD = einsum("bpk,kd->bpd", patches_BPK, self.patch.get_value(), whole)
        x_BPD = x_BPD + broadcast_to_rank(bias_D, 3)
        if self.position is not None:
            x_BPD = x_BPD + gathered(self.position, rules)[None]
        if config.positions == "sinusoidal":
            x_BPD = x_BPD + sinusoidal(self._positions(x_BPD), config.embed_dim).astype(x_BPD.dtype)
        x_BPD = jax.reshard(x_BPD, rules.spec(RESIDUAL))
        return dropout(x_BPD, config.dropout, _keys(key)[0], rules, RESIDUAL)

    def run_blocks(
        self,
        x_BPD: jax.Array,
        key: jax.Array | None = None,
        first: int | jax.Array | None = None,
    ) -> jax.Array:
        """The residual stream after the blocks that the stack's weights are of, see `Stack.run`."""
        rows = Rows(None, self._positions(x_BPD))

        def apply(block: Block, x_BPD: jax.Array, key: jax.Array | None, kind: str) -> jax.Array:
            return block(x_BPD, rows, key, local=kind == "local")[0]

        out_BPD: jax.Array = self.stack.run(apply, x_BPD, _keys(key)[1], first)
        return out_BPD

    def finish(self, x_BPD: jax.Array) -> jax.Array:
        """Features, of the residual stream after the last block."""
        if self.final_norm is not None:
            x_BPD = self.final_norm(x_BPD)
        return jax.reshard(x_BPD, self.rules.spec("batch seq act_embed"))

    def _positions(self, x_BPD: jax.Array) -> jax.Array:
        """The number of every patch, row by row of the image."""
        spec = self.rules.spec("batch seq")
        return jax.lax.broadcasted_iota(jnp.int32, x_BPD.shape[:2], 1, out_sharding=spec)


def _keys(key: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    """The keys of the embedding and of the blocks."""
    if key is None:
        return None, None
    embed_key, blocks_key = jax.random.split(key)
    return embed_key, blocks_key


def vit_weights(config: ModelConfig) -> tuple[list[Weight], list[Weight]]:
    """The weights of a `ViT`: those of one block, and those outside the stack."""
    D = config.embed_dim
    outside = [Weight((config.vision.patch_dim, D), "feature -> embed"), Weight((D,), "norm")]
    if config.positions == "learned":
        outside.append(Weight((config.vision.patches, D), "position -> embed"))
    if config.norm_position != "post":
        outside += norm_weights(D, config.norm)
    return block_weights(config), outside
