"""An encoder with heads: for its tokens, for whole rows, or for both.

BERT (Devlin et al. 2019, https://arxiv.org/abs/1810.04805) and RoBERTa (Liu et al. 2019,
https://arxiv.org/abs/1907.11692), for masked tokens and for classes.
"""

from __future__ import annotations

import jax
from flax import nnx

from models.config import ModelConfig
from models.encoder import Encoder, encoder_weights
from models.heads import Heads, heads_weights
from models.layers import constant, weight
from models.tables import Head
from models.transform import (
    HeadTransform,
    Pooler,
    dense_weights,
    head_transform_residuals,
    head_transform_weights,
)
from parallel.footprint import Activation, Weight
from parallel.remat import RematConfig
from parallel.rules import Rules
from parallel.twin import joined


class EncoderWithHeads(Encoder):
    """An `Encoder` with those heads that `config.token_head` and `config.tasks` ask for."""

    def __init__(
        self, config: ModelConfig, rules: Rules, remat: RematConfig, rngs: nnx.Rngs
    ) -> None:
        super().__init__(config, rules, remat, rngs)
        predicts, zeros = config.token_head, constant(0.0)
        transforms = predicts and config.head_transform
        self.head_transform = HeadTransform(config, rules, rngs) if transforms else None
        biased = predicts and config.head_bias
        rows = (config.padded_vocab,)
        self.head_bias = weight(rngs, rows, "vocab", rules, zeros) if biased else None
        pools = config.pooler and bool(config.tasks)
        self.pooler = Pooler(config, rules, rngs) if pools else None
        self.heads = Heads(config, rules, rngs) if config.tasks else None

    def token_features(self, x_BTD: jax.Array) -> jax.Array:
        """What `head` multiplies, of what `finish` gives; whole sequences."""
        if self.head_transform is not None:
            x_BTD = self.head_transform(x_BTD)
        return self.to_head(jax.reshard(x_BTD, self.rules.spec("batch seq act_embed")))

    def head(self) -> Head:
        """The same with a bias for each token, if it has one."""
        bias = None if self.head_bias is None else joined(self.head_bias.get_value())
        return super().head()._replace(bias=bias)

    def task_logits(self, x_BTD: jax.Array) -> dict[str, jax.Array]:
        """{task: logits [B, C]} of the first token of every row, of what `finish` gives."""
        assert self.heads is not None
        whole_BTD = jax.reshard(x_BTD, self.rules.spec("batch seq act_embed"))
        features_BD = whole_BTD[:, 0]
        return self.heads(features_BD if self.pooler is None else self.pooler(features_BD))


def encoder_heads_weights(config: ModelConfig) -> tuple[list[Weight], list[Weight]]:
    """The weights of an `EncoderWithHeads`: those of one block, and those outside the stack."""
    block, outside = encoder_weights(config)
    if config.token_head:
        outside += head_transform_weights(config) if config.head_transform else []
        outside += [Weight((config.padded_vocab,), "vocab")] if config.head_bias else []
    if config.tasks:
        outside += (dense_weights(config) if config.pooler else []) + heads_weights(config)
    return block, outside


def token_head_residuals(config: ModelConfig) -> list[Activation]:
    """What the backward pass of `EncoderWithHeads.token_features` keeps."""
    transforms = config.token_head and config.head_transform
    return head_transform_residuals(config) if transforms else []
