"""The tables of a model's tokens: embeddings, learned positions, and what gives logits.

Factorised, a table is [V, r] beside a projection [r, D] (ALBERT, Lan et al. 2019, section 3.1,
https://arxiv.org/abs/1909.11942).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.block import RESIDUAL
from models.config import ModelConfig
from models.layers import gathered, normal, weight
from models.positions import sinusoidal
from parallel.einsum import einsum
from parallel.footprint import Weight
from parallel.rules import Rules
from parallel.twin import joined


class Head(NamedTuple):
    """The weight that turns `TokenTables.to_head` into logits, the order of its dims, and a bias
    [V].
    """

    weight: jax.Array
    axes: str  # "vocab -> embed" (tied table) or "embed -> vocab"; "rank" where factorised
    bias: jax.Array | None = None


class TokenTables(nnx.Module):
    """What a model of tokens has of tables: of embeddings, of positions that are learned, and of a
    loss head that is not the embeddings'.

    Args:
      embedding: whether it has a table of embeddings.
    """

    def __init__(
        self, config: ModelConfig, rules: Rules, rngs: nnx.Rngs, *, embedding: bool = True
    ) -> None:
        D, V, R = config.embed_dim, config.padded_vocab, config.embed_rank
        table, wide = (V, config.table_dim), "rank" if R else "embed"
        init = normal(config.init_std)
        # Embeddings and logits are then as large as without a rank.
        project = normal(R**-0.5) if R else init
        own = config.token_head and not config.tied
        self.config, self.rules = config, rules
        self.embedding = weight(rngs, table, f"vocab -> {wide}", rules, init) if embedding else None
        self.embedding_projection = (
            weight(rngs, (R, D), "rank -> embed", rules, project) if R and embedding else None
        )
        rows = config.position_offset + config.max_length
        learned = config.positions == "learned"
        self.position = (
            weight(rngs, (rows, D), "position -> embed", rules, init) if learned else None
        )
        self.head_weight = (
            weight(rngs, table[::-1], f"{wide} -> vocab", rules, init) if own else None
        )
        self.head_projection = (
            weight(rngs, (D, R), "embed -> rank", rules, project) if R and own else None
        )

    def look_up(self, tokens_BT: jax.Array) -> jax.Array:
        """The embeddings of tokens x_BTD, without positions, in the residual stream's layout."""
        assert self.embedding is not None
        x_BTD = take(gathered(self.embedding, self.rules), tokens_BT, self.rules)
        if self.embedding_projection is not None:
            projection = self.embedding_projection.get_value()
            x_BTD = einsum("btr,rd->btd", x_BTD, projection, self.rules.spec(RESIDUAL))
        if self.config.embed_scale:
            x_BTD = x_BTD * jnp.asarray(self.config.embed_dim**0.5, x_BTD.dtype)
        return x_BTD

    def add_positions(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Embeddings with their positions, where those are added."""
        config, rules = self.config, self.rules
        if self.position is not None:
            index = positions_BT + config.position_offset
            x_BTD = x_BTD + take(gathered(self.position, rules), index, rules)
        if config.positions == "sinusoidal":
            added = sinusoidal(positions_BT, config.embed_dim).astype(x_BTD.dtype)
            x_BTD = x_BTD + jax.reshard(added, rules.spec(RESIDUAL))
        return x_BTD

    def to_head(self, hidden_BTD: jax.Array) -> jax.Array:
        """What `head` multiplies, of hidden features: [B, T, r] where the head is factorised."""
        spec = self.rules.spec("batch seq act_embed")
        if self.head_projection is not None:
            return einsum("btd,dr->btr", hidden_BTD, self.head_projection.get_value(), spec)
        if self.embedding_projection is not None:  # tied: back through the same weight
            return einsum("btd,rd->btr", hidden_BTD, self.embedding_projection.get_value(), spec)
        return hidden_BTD

    def head(self) -> Head:
        """The weight of the loss head, in the model's layout (the loss gathers it over fsdp)."""
        table = self.embedding if self.head_weight is None else self.head_weight
        assert table is not None
        return Head(joined(table.get_value()), table.axes)


def take(table_VD: jax.Array, index_BT: jax.Array, rules: Rules) -> jax.Array:
    """Rows of a table, in the residual stream's layout."""
    # Looked up for the whole sequence first: with vocabulary and sequence divided over one axis XLA
    # would gather the batch instead.
    rows_BTD = table_VD.at[index_BT].get(out_sharding=rules.spec("batch seq act_embed"))
    return jax.reshard(rows_BTD, rules.spec(RESIDUAL))


def table_weights(config: ModelConfig, *, embedding: bool = True) -> list[Weight]:
    """The weights of `TokenTables`, the table of embeddings first."""
    D, V, R = config.embed_dim, config.padded_vocab, config.embed_rank
    table, wide = (V, config.table_dim), "rank" if R else "embed"
    own = config.token_head and not config.tied
    weights = [Weight(table, f"vocab -> {wide}")] if embedding else []
    weights += [Weight((R, D), "rank -> embed")] if R and embedding else []
    if config.positions == "learned":
        weights.append(Weight((config.position_offset + config.max_length, D), "position -> embed"))
    weights += [Weight(table[::-1], f"{wide} -> vocab")] if own else []
    return weights + ([Weight((D, R), "embed -> rank")] if R and own else [])
