"""What an encoder is trained for: masked tokens, labels of rows, or both over one trunk."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import ModelConfig
from models.encoder_heads import EncoderWithHeads
from parallel.cut import Cut
from parallel.pipeline import PipelineConfig
from parallel.remat import RematConfig
from parallel.rules import Rules
from training.classification import tasks_loss
from training.functional import functional
from training.losses import LossConfig
from training.micro_batches import Batch, Weights
from training.state import Model
from training.token_loss import token_loss

Sums = tuple[jax.Array, dict[str, jax.Array]]


def encoder_model(
    config: ModelConfig,
    loss: LossConfig,
    task_weight: float,
    rules: Rules,
    remat: RematConfig,
    pipeline: PipelineConfig | None = None,
) -> Model:
    """An encoder that predicts tokens where `config.token_head`, and labels for `config.tasks`.

    Args:
      task_weight: of the tasks' losses, beside that of tokens.
    """

    def build(key: jax.Array) -> EncoderWithHeads:
        return EncoderWithHeads(config, rules, remat, nnx.Rngs(params=key))

    def heads_loss(
        model: EncoderWithHeads, x_BTD: jax.Array, batch: Batch, weights: Weights
    ) -> Sums:
        x_BTD = model.finish(x_BTD)
        total: jax.Array = jnp.float32(0)
        sums: dict[str, jax.Array] = {}
        if config.token_head:
            features_BTD = model.token_features(x_BTD)
            total, sums = token_loss(
                model.head(), features_BTD, batch, weights, config, loss, rules
            )
        if config.tasks:
            labelled, task_sums = tasks_loss(model.task_logits(x_BTD), batch, weights.rows_B)
            total += labelled * (task_weight if config.token_head else 1.0)
            sums |= task_sums
        return total, sums

    def whole(
        model: EncoderWithHeads, batch: Batch, weights: Weights, key: jax.Array | None
    ) -> Sums:
        x_BTD = model.run_blocks(model.embed(batch, key), batch, key)
        return heads_loss(model, x_BTD, batch, weights)

    def blocks(
        model: EncoderWithHeads,
        x_BTD: jax.Array,
        batch: Batch,
        key: jax.Array | None,
        first: jax.Array,
        weights: Weights,
    ) -> jax.Array:
        return model.run_blocks(x_BTD, batch, key, first)

    cut = Cut(
        embed=lambda model, *args: model.embed(*args),
        blocks=blocks,
        loss=heads_loss,
        layers=config.layers,
        period=len(config.pattern),
    )
    return functional(build, rules, whole, cut, pipeline)
