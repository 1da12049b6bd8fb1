"""Next-token prediction: the decoder's features through the vocabulary-sharded loss."""

from __future__ import annotations

import jax
from flax import nnx

from models.config import ModelConfig
from models.decoder import Decoder
from parallel.cut import Cut
from parallel.pipeline import PipelineConfig
from parallel.remat import RematConfig
from parallel.rules import Rules
from training.features import Features, predictor
from training.functional import functional
from training.losses import LossConfig
from training.micro_batches import Batch, Weights
from training.state import Model
from training.token_loss import score_tokens, token_loss

Sums = tuple[jax.Array, dict[str, jax.Array]]


def causal_lm(
    config: ModelConfig,
    loss: LossConfig,
    rules: Rules,
    remat: RematConfig,
    pipeline: PipelineConfig | None = None,
) -> Model:
    """A decoder whose every token predicts the next; where a batch has a `prefix`, those of it see
    each other (Raffel et al. 2020, section 3.2.1, https://arxiv.org/abs/1910.10683).
    """
    return next_token(Decoder, config, loss, rules, remat, pipeline)


def next_token(
    kind: type[Decoder],
    config: ModelConfig,
    loss: LossConfig,
    rules: Rules,
    remat: RematConfig,
    pipeline: PipelineConfig | None,
) -> Model:
    """A decoder of any kind that is trained to predict the next token."""

    def build(key: jax.Array) -> Decoder:
        return kind(config, rules, remat, nnx.Rngs(params=key))

    def head_loss(model: Decoder, hidden_BTD: jax.Array, batch: Batch, weights: Weights) -> Sums:
        head = predictor(model.head(), model.to_head(hidden_BTD), config.logit_softcap)
        return token_loss(head, batch, weights, config, loss, rules)

    def features(
        model: Decoder,
        batch: Batch,
        weights: Weights | None,
        key: jax.Array | None,
        after: tuple[int, ...] = (),
    ) -> Features:
        weights_BT = None if weights is None else weights.tokens_BT
        x_BTD, router_sums, states = model.run_and_keep(
            model.embed(batch, key), batch, key, None, weights_BT, after
        )
        features_BTD = model.to_head(model.finish(x_BTD, batch))
        head = predictor(model.head(), features_BTD, config.logit_softcap)
        return Features(head, states, None, router_sums)

    def whole(model: Decoder, batch: Batch, weights: Weights, key: jax.Array | None) -> Sums:
        forward = features(model, batch, weights, key)
        return forward.completed(
            *token_loss(forward.predictor, batch, weights, config, loss, rules)
        )

    def blocks(
        model: Decoder,
        x_BTD: jax.Array,
        batch: Batch,
        key: jax.Array | None,
        first: jax.Array,
        weights: Weights,
    ) -> jax.Array:
        return model.run_blocks(x_BTD, batch, key, first, weights.tokens_BT)[0]

    def scores(model: Decoder, batch: Batch) -> tuple[jax.Array, jax.Array]:
        head = predictor(model.head(), model.to_head(model(batch)), config.logit_softcap)
        return score_tokens(head, batch["targets"], config, loss, rules)

    cut = Cut(
        embed=lambda model, *args: model.embed(*args),
        blocks=blocks,
        loss=lambda model, x_BTD, batch, weights: head_loss(
            model, model.finish(x_BTD, batch), batch, weights
        ),
        layers=config.layers,
        period=len(config.pattern),
    )
    return functional(build, rules, whole, cut, pipeline, scores, features)
