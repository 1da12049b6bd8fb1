"""What a model is trained for: from a model's config to the pure functions that the step takes."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from models.config import DecoderConfig
from models.decoder import Decoder, logical_axes
from parallel.cut import Cut
from parallel.pipeline import PipelineConfig
from parallel.remat import RematConfig
from parallel.rules import Rules
from training.losses import LossConfig, cross_entropy
from training.state import Model


def causal_lm(
    config: DecoderConfig,
    loss: LossConfig,
    rules: Rules,
    remat: RematConfig,
    pipeline: PipelineConfig | None = None,
) -> Model:
    """Next-token prediction: the decoder's features through the vocabulary-sharded loss."""

    def build(key: jax.Array) -> Decoder:
        return Decoder(config, rules, remat, nnx.Rngs(params=key))

    # What is static about the model, without computing anything.
    graph, abstract = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))

    axes = logical_axes(abstract)

    def init(key: jax.Array) -> Any:
        def at_rest(array: jax.Array, names: str) -> jax.Array:
            return jax.reshard(array, rules.at_rest(names, array.shape))  # layers over stages

        return jax.tree.map(at_rest, nnx.to_pure_dict(nnx.state(build(key))), axes)

    def weighted_loss(
        params: Any, batch: dict[str, jax.Array], weights_BT: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = nnx.merge(graph, params)
        return head_loss(model, model(batch, key), batch, weights_BT)

    def head_loss(
        model: Decoder, hidden_BTD: jax.Array, batch: dict[str, jax.Array], weights_BT: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        head = model.head()
        return cross_entropy(
            hidden_BTD,
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

    def blocks(params: Any, x_BTD: jax.Array, *args: Any) -> jax.Array:
        return nnx.merge(graph, params).run_blocks(x_BTD, *args)

    def last_loss(
        params: Any, x_BTD: jax.Array, batch: dict[str, jax.Array], weights_BT: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = nnx.merge(graph, params)
        return head_loss(model, model.finish(x_BTD), batch, weights_BT)

    cut = Cut(
        embed=lambda params, *args: nnx.merge(graph, params).embed(*args),
        blocks=blocks,
        loss=last_loss,
        layers=config.layers,
        period=len(config.pattern),
    )
    return Model(init, axes, weighted_loss, rules, cut, pipeline)
