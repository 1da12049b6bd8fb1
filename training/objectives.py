"""What a model is trained for: from a model's config to the pure functions that the step takes."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from models.config import DecoderConfig
from models.decoder import Decoder, logical_axes
from parallel.remat import RematConfig
from parallel.rules import Rules
from training.losses import LossConfig, cross_entropy
from training.state import Model


def causal_lm(config: DecoderConfig, loss: LossConfig, rules: Rules, remat: RematConfig) -> Model:
    """Next-token prediction: the decoder's features through the vocabulary-sharded loss."""

    def build(key: jax.Array) -> Decoder:
        return Decoder(config, rules, remat, nnx.Rngs(params=key))

    # What is static about the model, without computing anything.
    graph, abstract = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))

    def init(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(build(key)))

    def weighted_loss(
        params: Any, batch: dict[str, jax.Array], weights_BT: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = nnx.merge(graph, params)
        head = model.head()
        return cross_entropy(
            model(batch, key),
            head.weight,
            batch["targets"],
            weights_BT,
            rules=rules,
            vocab_size=config.vocab_size,
            table_axes=head.axes,
            chunk=loss.chunk,
            softcap=config.logit_softcap or None,
            z_loss=loss.z_loss,
        )

    return Model(init, logical_axes(abstract), weighted_loss, rules)
