"""Images classified by one or more tasks: a ViT, the mean of its features, a head for each task."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import ModelConfig
from models.heads import Heads
from models.vision import ViT
from parallel.cut import Cut
from parallel.pipeline import PipelineConfig
from parallel.remat import RematConfig
from parallel.rules import Rules
from training.classification import Sums, tasks_loss
from training.functional import functional
from training.micro_batches import Batch, Weights
from training.state import Model


class Classifier(nnx.Module):
    """A ViT with heads; its layers are those that stages divide."""

    def __init__(
        self, config: ModelConfig, rules: Rules, remat: RematConfig, rngs: nnx.Rngs
    ) -> None:
        self.vision = ViT(config, rules, remat, rngs)
        self.heads = Heads(config, rules, rngs)

    def loss(self, x_BPD: jax.Array, batch: Batch, weights: Weights) -> Sums:
        """Of the residual stream after the last block."""
        features_BD = jnp.mean(self.vision.finish(x_BPD), axis=1)
        return tasks_loss(self.heads(features_BD), batch, weights.rows_B)


def image_classification(
    config: ModelConfig,
    rules: Rules,
    remat: RematConfig,
    pipeline: PipelineConfig | None = None,
) -> Model:
    """A model of family `vision` with `config.tasks`."""

    def build(key: jax.Array) -> Classifier:
        return Classifier(config, rules, remat, nnx.Rngs(params=key))

    def embed(model: Classifier, batch: Batch, key: jax.Array | None) -> jax.Array:
        return model.vision.embed(batch["patches"], key)

    def whole(model: Classifier, batch: Batch, weights: Weights, key: jax.Array | None) -> Sums:
        x_BPD = model.vision.run_blocks(embed(model, batch, key), key)
        return model.loss(x_BPD, batch, weights)

    def blocks(
        model: Classifier,
        x_BPD: jax.Array,
        batch: Batch,
        key: jax.Array | None,
        first: jax.Array,
        weights: Weights,
    ) -> jax.Array:
        return model.vision.run_blocks(x_BPD, key, first)

    cut = Cut(
        embed=embed,
        blocks=blocks,
        loss=lambda model, *args: model.loss(*args),
        layers=config.layers,
        period=len(config.pattern),
    )
    return functional(build, rules, whole, cut, pipeline)
