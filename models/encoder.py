"""The encoder: embeddings, a stack of blocks that see both ways, final norm.

The trunk of BERT (Devlin et al. 2019, https://arxiv.org/abs/1810.04805) and RoBERTa (Liu et al.
2019, https://arxiv.org/abs/1907.11692), and the encoder of an encoder-decoder, by `ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
from flax import nnx

from models.block import RESIDUAL, Block, block_weights, final_norm_of, norm_of, stack_of
from models.config import ModelConfig
from models.layers import (
    broadcast_to_rank,
    dropout,
    gathered,
    norm_residuals,
    norm_weights,
    normal,
    weight,
)
from models.relative_positions import RelativePositions, relative_weights
from models.rows import rows_of
from models.states import run_and_keep
from models.tables import TokenTables, table_weights, take
from parallel.footprint import Activation, Weight
from parallel.remat import RematConfig
from parallel.rules import STAGED, Rules


class Encoder(TokenTables):
    """tokens [B, T] -> x_BTD of the residual stream after the final norm.

    Args:
      config: of family "encoder".
      axis: logical name of its layer axis.
      own_table: it has a table of embeddings; if not, `embed` is given another's.
    """

    def __init__(
        self,
        config: ModelConfig,
        rules: Rules,
        remat: RematConfig,
        rngs: nnx.Rngs,
        *,
        axis: str = STAGED,
        own_table: bool = True,
    ) -> None:
        super().__init__(config, rules, rngs, embedding=own_table)

        relative = config.positions == "relative"
        self.relative = RelativePositions(config, rules, rngs) if relative else None
        types = (config.token_types, config.embed_dim), "token_type -> embed"
        self.token_type = (
            weight(rngs, *types, rules, normal(config.init_std)) if config.token_types else None
        )
        self.embed_norm = norm_of(config, rules, rngs) if config.embed_norm else None
        self.stack = stack_of(config, rules, remat, rngs, axis)
        self.final_norm = final_norm_of(config, rules, rngs)

    def __call__(
        self,
        batch: Mapping[str, jax.Array],
        key: jax.Array | None = None,
        tables: TokenTables | None = None,
    ) -> jax.Array:
        """Features of every token, in the residual stream's layout; `key` turns dropout on."""
        return self.finish(self.run_blocks(self.embed(batch, key, tables), batch, key))

    def embed(
        self,
        batch: Mapping[str, jax.Array],
        key: jax.Array | None = None,
        tables: TokenTables | None = None,
    ) -> jax.Array:
        """The first x_BTD of the residual stream; tokens are of type 0 without `token_types`."""
        config, rules = self.config, self.rules
        x_BTD = (tables or self).look_up(batch["tokens"])
        if self.token_type is not None:
            types = gathered(self.token_type, rules)
            if "token_types" in batch:
                x_BTD = x_BTD + take(types, batch["token_types"], rules)
            else:
                x_BTD = x_BTD + broadcast_to_rank(types[0], 3)
        x_BTD = self.add_positions(x_BTD, batch["positions"])
        if self.embed_norm is not None:
            x_BTD = self.embed_norm(x_BTD)
        embed_key = None if key is None else jax.random.split(key)[0]
        return dropout(x_BTD, config.dropout, embed_key, rules, RESIDUAL)

    def run_blocks(
        self,
        x_BTD: jax.Array,
        batch: Mapping[str, jax.Array],
        key: jax.Array | None = None,
        first: int | jax.Array | None = None,
    ) -> jax.Array:
        """The residual stream after all blocks, or those of a stage's unit: see `Stack.run`."""
        return self.run_and_keep(x_BTD, batch, key, first)[0]

    def run_and_keep(
        self,
        x_BTD: jax.Array,
        batch: Mapping[str, jax.Array],
        key: jax.Array | None = None,
        first: int | jax.Array | None = None,
        after: tuple[int, ...] = (),
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """The same, and the residual streams `after` so many layers."""
        rows = rows_of(batch)
        if self.relative is not None:
            rows = rows._replace(bias=self.relative.bias(x_BTD.shape[1]))

        def apply(block: Block, x_BTD: jax.Array, key: jax.Array | None, kind: str) -> jax.Array:
            return block(x_BTD, rows, key, local=kind == "local")[0]

        blocks_key = None if key is None else jax.random.split(key)[1]
        stream = lambda x_BTD: x_BTD
        return run_and_keep(self.stack, apply, x_BTD, blocks_key, first, after, stream)

    def finish(self, x_BTD: jax.Array) -> jax.Array:
        """The residual stream after the final norm, of that after the last block."""
        return x_BTD if self.final_norm is None else self.final_norm(x_BTD)


def encoder_weights(
    config: ModelConfig, *, own_table: bool = True
) -> tuple[list[Weight], list[Weight]]:
    """The weights of an `Encoder`: those of one block, and those outside the stack."""
    outside = table_weights(config, embedding=own_table) + relative_weights(config)
    if config.token_types:
        outside.append(Weight((config.token_types, config.embed_dim), "token_type -> embed"))
    norms = config.embed_norm + (config.norm_position != "post")
    return block_weights(config), outside + norm_weights(config.embed_dim, config.norm) * norms


def embedding_residuals(config: ModelConfig) -> list[Activation]:
    """What the backward pass of `Encoder.embed` keeps."""
    masks = [Activation("dropout", RESIDUAL, "bool")] if config.dropout else []
    return (norm_residuals(RESIDUAL) if config.embed_norm else []) + masks
