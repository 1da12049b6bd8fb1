"""The decoder: embedding, stack of blocks, final norm; its table or its own head gives the logits.

From GPT-2 (Radford et al. 2019) to Llama 3 (https://arxiv.org/abs/2407.21783), Qwen 3
(https://arxiv.org/abs/2505.09388) and Gemma 3 (https://arxiv.org/abs/2503.19786), by
`DecoderConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.block import RESIDUAL, Block, Rows, block_weights
from models.config import DecoderConfig
from models.layers import Norm, dropout, gathered, norm_weights, normal, weight
from models.positions import sinusoidal
from models.stack import STACKED, Stack
from parallel.footprint import Weight
from parallel.remat import RematConfig
from parallel.rules import Rules
from parallel.zero import joined


class Head(NamedTuple):
    """The weight that turns hidden features into logits, and the order of its dims."""

    weight: jax.Array
    axes: str  # "vocab -> embed" (tied table) or "embed -> vocab"


class Decoder(nnx.Module):
    """tokens [B, T] -> hidden x_BTD after the final norm; `head()` is for the loss.

    Logits are not formed here: of a whole batch they would be the largest tensor of all.
    """

    def __init__(
        self, config: DecoderConfig, rules: Rules, remat: RematConfig, rngs: nnx.Rngs
    ) -> None:
        D, V = config.embed_dim, config.padded_vocab
        init = normal(config.init_std)
        self.config, self.rules = config, rules
        self.embedding = weight(rngs, (V, D), "vocab -> embed", rules, init)
        self.head_weight = (
            None if config.tied else weight(rngs, (D, V), "embed -> vocab", rules, init)
        )
        self.position = (
            weight(rngs, (config.max_length, D), "position -> embed", rules, init)
            if config.positions == "learned"
            else None
        )
        self.stack = Stack(
            lambda rngs: Block(config, rules, rngs),
            config.layers,
            rngs,
            pattern=config.pattern,
            remat=remat,
            unroll=config.unroll,
        )
        # Post-norm blocks end in a norm already.
        self.final_norm = (
            Norm(
                D, rules, rngs, kind=config.norm, eps=config.norm_eps, plus_one=config.norm_plus_one
            )
            if config.norm_position != "post"
            else None
        )

    def __call__(self, batch: Mapping[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """Hidden features of a batch (`data.loader`); `key` turns dropout on.

        Returns:
          x_BTD in compute dtype, the whole sequence on every device of `tensor`.
        """
        return self.finish(self.run_blocks(self.embed(batch, key), batch, key))

    def embed(self, batch: Mapping[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """The first x_BTD of the residual stream."""
        config, rules = self.config, self.rules
        positions = batch["positions"]
        x_BTD = take(gathered(self.embedding, rules), batch["tokens"], rules)
        if config.embed_scale:
            x_BTD = x_BTD * jnp.asarray(config.embed_dim**0.5, x_BTD.dtype)
        if self.position is not None:
            x_BTD = x_BTD + take(gathered(self.position, rules), positions, rules)
        if config.positions == "sinusoidal":
            x_BTD = x_BTD + jax.reshard(
                sinusoidal(positions, config.embed_dim).astype(x_BTD.dtype),
                rules.spec(RESIDUAL),
            )
        return dropout(x_BTD, config.dropout, _keys(key)[0], rules, RESIDUAL)

    def run_blocks(
        self,
        x_BTD: jax.Array,
        batch: Mapping[str, jax.Array],
        key: jax.Array | None = None,
        first: int | jax.Array = 0,
    ) -> jax.Array:
        """The residual stream after the blocks that the stack's weights are of, see `Stack.run`."""
        rows = Rows(batch["segments"], batch["positions"])

        def apply(block: Block, x_BTD: jax.Array, key: jax.Array | None, kind: str) -> jax.Array:
            return block(x_BTD, rows, key, local=kind == "local")

        return self.stack.run(apply, x_BTD, _keys(key)[1], first)

    def finish(self, x_BTD: jax.Array) -> jax.Array:
        """Hidden features, of the residual stream after the last block."""
        if self.final_norm is not None:
            x_BTD = self.final_norm(x_BTD)
        return jax.reshard(x_BTD, self.rules.spec("batch seq act_embed"))

    def head(self) -> Head:
        """The weight of the loss head, in the model's layout (the loss gathers it over fsdp)."""
        if self.head_weight is None:
            return Head(joined(self.embedding.get_value()), self.embedding.axes)
        return Head(joined(self.head_weight.get_value()), self.head_weight.axes)


def _keys(key: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    """The keys of the embedding and of the blocks."""
    if key is None:
        return None, None
    embed_key, blocks_key = jax.random.split(key)
    return embed_key, blocks_key


def take(table_VD: jax.Array, index_BT: jax.Array, rules: Rules) -> jax.Array:
    """Rows of a table, in the residual stream's layout."""
    # Looked up for the whole sequence first: with vocabulary and sequence divided over one axis XLA
    # would gather the batch instead.
    rows_BTD = table_VD.at[index_BT].get(out_sharding=rules.spec("batch seq act_embed"))
    return jax.reshard(rows_BTD, rules.spec(RESIDUAL))


def logical_axes(abstract: nnx.State) -> Any:
    """The tree of logical axis strings of the parameters; stacked ones begin with `layers`."""

    def axes(path: tuple[Any, ...], param: nnx.Variable) -> str:
        return f"layers {param.axes}" if STACKED in path else param.axes

    flat = [(path, axes(path, param)) for path, param in nnx.to_flat_state(abstract)]
    tree: dict[str, Any] = {}
    for path, names in flat:
        at = tree
        for part in map(str, path[:-1]):
            at = at.setdefault(part, {})
        at[str(path[-1])] = names
    return tree


def decoder_weights(config: DecoderConfig) -> tuple[list[Weight], list[Weight]]:
    """The weights of a `Decoder`: those of one block, and those outside the stack."""
    D, V = config.embed_dim, config.padded_vocab
    outside = [Weight((V, D), "vocab -> embed")]
    if not config.tied:
        outside.append(Weight((D, V), "embed -> vocab"))
    if config.positions == "learned":
        outside.append(Weight((config.max_length, D), "position -> embed"))
    if config.norm_position != "post":
        outside += norm_weights(D, config.norm)
    return block_weights(config), outside
