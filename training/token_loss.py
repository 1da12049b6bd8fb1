"""The loss of predicted tokens: the next ones, or those that were masked.

Masked ones after Devlin et al. 2019, section 3.1, https://arxiv.org/abs/1810.04805.
"""

from __future__ import annotations

import jax

from models.config import ModelConfig
from parallel.rules import Rules
from training.features import Predictor
from training.losses import LossConfig, cross_entropy, token_scores
from training.micro_batches import Batch, Weights


def token_loss(
    head: Predictor,
    batch: Batch,
    weights: Weights,
    config: ModelConfig,
    loss: LossConfig,
    rules: Rules,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`cross_entropy` of `batch["targets"]`, of which those in `weights` count."""
    return cross_entropy(
        head.x_BTD,
        head.table,
        batch["targets"],
        weights.tokens_BT,
        rules=rules,
        vocab_size=config.vocab_size,
        table_axes=head.table_axes,
        bias=head.bias,
        chunk=loss.chunk,
        softcap=head.softcap,
        z_loss=loss.z_loss,
    )


def score_tokens(
    head: Predictor,
    targets_BT: jax.Array,
    config: ModelConfig,
    loss: LossConfig,
    rules: Rules,
) -> tuple[jax.Array, jax.Array]:
    """`token_scores` of targets, of which none is weighted."""
    return token_scores(
        head.x_BTD,
        head.table,
        targets_BT,
        rules=rules,
        vocab_size=config.vocab_size,
        table_axes=head.table_axes,
        bias=head.bias,
        chunk=loss.chunk,
        softcap=head.softcap,
    )
