"""The loss of predicted tokens: the next ones, or those that were masked.

Masked ones after Devlin et al. 2019, section 3.1, https://arxiv.org/abs/1810.04805.
"""

from __future__ import annotations

import jax

from models.config import ModelConfig
from models.tables import Head
from parallel.rules import Rules
from training.losses import LossConfig, cross_entropy, token_scores
from training.micro_batches import Batch, Weights


def token_loss(
    head: Head,
    features_BTD: jax.Array,
    batch: Batch,
    weights: Weights,
    config: ModelConfig,
    loss: LossConfig,
    rules: Rules,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`cross_entropy` of `batch["targets"]`, of which those in `weights` count.

    Args:
      features_BTD: what the head multiplies.
    """
    return cross_entropy(
        features_BTD,
        head.weight,
        batch["targets"],
        weights.tokens_BT,
        rules=rules,
        vocab_size=config.vocab_size,
        table_axes=head.axes,
        bias=head.bias,
        chunk=loss.chunk,
        softcap=config.logit_softcap or None,
        z_loss=loss.z_loss,
    )


def score_tokens(
    head: Head,
    features_BTD: jax.Array,
    targets_BT: jax.Array,
    config: ModelConfig,
    loss: LossConfig,
    rules: Rules,
) -> tuple[jax.Array, jax.Array]:
    """`token_scores` of targets, of which none is weighted."""
    return token_scores(
        features_BTD,
        head.weight,
        targets_BT,
        rules=rules,
        vocab_size=config.vocab_size,
        table_axes=head.axes,
        bias=head.bias,
        chunk=loss.chunk,
        softcap=config.logit_softcap or None,
    )
