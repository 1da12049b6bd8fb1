"""The decoder: embedding, stack of blocks, final norm; its table or its own head gives the logits.

From GPT-2 (Radford et al. 2019) to Llama 3 (https://arxiv.org/abs/2407.21783), Qwen 3
(https://arxiv.org/abs/2505.09388) and Gemma 3 (https://arxiv.org/abs/2503.19786), by
`ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from models.block import RESIDUAL, Block, block_weights, final_norm_of, stack_of
from models.config import ModelConfig
from models.layers import dropout, norm_weights
from models.relative_positions import RelativePositions, relative_weights
from models.router import router_sums
from models.rows import Rows, rows_of
from models.states import run_and_keep
from models.tables import TokenTables, table_weights
from parallel.footprint import Weight
from parallel.remat import RematConfig
from parallel.rules import Rules


class Decoder(TokenTables):
    """tokens [B, T] -> hidden x_BTD after the final norm; `head()` is for the loss.

    Logits are not formed here: of a whole batch they would be the largest tensor of all.
    """

    def __init__(
        self, config: ModelConfig, rules: Rules, remat: RematConfig, rngs: nnx.Rngs
    ) -> None:
        super().__init__(config, rules, rngs)
        self.stack = stack_of(config, rules, remat, rngs)
        self.relative = (
            RelativePositions(config, rules, rngs) if config.positions == "relative" else None
        )
        self.final_norm = final_norm_of(config, rules, rngs)

    def __call__(self, batch: Mapping[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """Hidden features of a batch (`data.loader`); `key` turns dropout on.

        Returns:
          x_BTD in compute dtype, the whole sequence on every device of `tensor`.
        """
        return self.finish(self.run_blocks(self.embed(batch, key), batch, key)[0], batch)

    def embed(self, batch: Mapping[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """The first x_BTD of the residual stream."""
        x_BTD = self.add_positions(self.look_up(batch["tokens"]), batch["positions"])
        return dropout(x_BTD, self.config.dropout, _keys(key)[0], self.rules, RESIDUAL)

    def run_blocks(
        self,
        x_BTD: jax.Array,
        batch: Mapping[str, jax.Array],
        key: jax.Array | None = None,
        first: int | jax.Array | None = None,
        weights_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The residual stream after all blocks, or after those of a stage's unit: see `Stack.run`.

        Args:
          weights_BT: of tokens in the loss of the step, which the losses of routers then join.

        Returns:
          x_BTD, and those losses' float32 sums, weighted by `weights_BT`: means over layers.
        """
        return self.run_and_keep(x_BTD, batch, key, first, weights_BT)[:2]

    def run_and_keep(
        self,
        x_BTD: jax.Array,
        batch: Mapping[str, jax.Array],
        key: jax.Array | None = None,
        first: int | jax.Array | None = None,
        weights_BT: jax.Array | None = None,
        after: tuple[int, ...] = (),
    ) -> tuple[jax.Array, dict[str, jax.Array], tuple[jax.Array, ...]]:
        """The same, and the residual streams of the batch's tokens `after` so many layers."""
        rows = rows_of(batch, weights_BT)
        if self.relative is not None:
            rows = rows._replace(bias=self.relative.bias(x_BTD.shape[1]))
        return self.run_rows(x_BTD, rows, key, first, after)

    def run_rows(
        self,
        x_BTD: jax.Array,
        rows: Rows,
        key: jax.Array | None,
        first: int | jax.Array | None,
        after: tuple[int, ...] = (),
    ) -> tuple[jax.Array, dict[str, jax.Array], tuple[jax.Array, ...]]:
        """The same, for rows that are complete."""
        Carry = tuple[jax.Array, dict[str, jax.Array]]

        def apply(block: Block, carry: Carry, key: jax.Array | None, kind: str) -> Carry:
            x_BTD, sums = block(carry[0], rows, key, local=kind == "local")
            layers = self.config.layers
            return x_BTD, {name: carry[1][name] + sums[name] / layers for name in sums}

        names = () if rows.weights is None else router_sums(self.config.experts)
        start = x_BTD, {name: jnp.float32(0) for name in names}
        stream = lambda carry: carry[0]
        (x_BTD, sums), states = run_and_keep(
            self.stack, apply, start, _keys(key)[1], first, after, stream
        )
        return x_BTD, sums, states

    def finish(self, x_BTD: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Hidden features, of the residual stream after the last block."""
        del batch
        if self.final_norm is not None:
            x_BTD = self.final_norm(x_BTD)
        if self.config.head_scale:
            x_BTD = x_BTD * jnp.asarray(self.config.embed_dim**-0.5, x_BTD.dtype)
        return jax.reshard(x_BTD, self.rules.spec("batch seq act_embed"))


def _keys(key: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    """The keys of the embedding and of the blocks."""
    if key is None:
        return None, None
    embed_key, blocks_key = jax.random.split(key)
    return embed_key, blocks_key


def decoder_weights(config: ModelConfig) -> tuple[list[Weight], list[Weight]]:
    """The weights of a `Decoder`: those of one block, and those outside the stack."""
    outside = table_weights(config) + relative_weights(config)
    if config.norm_position != "post":
        outside += norm_weights(config.embed_dim, config.norm)
    return block_weights(config), outside
