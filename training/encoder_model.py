"""What an encoder is trained for: masked tokens, labels of rows, or both over one trunk."""

from __future__ import annotations

import jax
from flax import nnx

from models.config import ModelConfig
from models.encoder_heads import EncoderWithHeads
from parallel.cut import Cut
from parallel.pipeline import PipelineConfig
from parallel.remat import RematConfig
from parallel.rules import Rules
from training.classification import tasks_loss
from training.features import Features, predictor
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

    def heads(
        model: EncoderWithHeads,
        x_BTD: jax.Array,
        batch: Batch,
        weights: Weights | None,
        states: tuple[jax.Array, ...] = (),
    ) -> Features:
        """What the token head multiplies, and the loss of tasks where there are weights."""
        x_BTD = model.finish(x_BTD)
        head = predictor(model.head(), model.token_features(x_BTD), config.logit_softcap)
        if weights is None or not config.tasks:
            return Features(head, states, None, {})
        labelled, sums = tasks_loss(model.task_logits(x_BTD), batch, weights.rows_B)
        return Features(head, states, labelled * task_weight, sums)

    def heads_loss(
        model: EncoderWithHeads, x_BTD: jax.Array, batch: Batch, weights: Weights
    ) -> Sums:
        if not config.token_head:
            return tasks_loss(model.task_logits(model.finish(x_BTD)), batch, weights.rows_B)
        forward = heads(model, x_BTD, batch, weights)
        return forward.completed(
            *token_loss(forward.predictor, batch, weights, config, loss, rules)
        )

    def features(
        model: EncoderWithHeads,
        batch: Batch,
        weights: Weights | None,
        key: jax.Array | None,
        after: tuple[int, ...] = (),
    ) -> Features:
        x_BTD, states = model.run_and_keep(model.embed(batch, key), batch, key, None, after)
        return heads(model, x_BTD, batch, weights, states)

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
    given = features if config.token_head else None
    return functional(build, rules, whole, cut, pipeline, features=given)
