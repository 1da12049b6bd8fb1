"""A Flax module and what is asked of it as the pure functions that the step takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import jax
from flax import nnx

from models.stack import logical_axes
from parallel.cut import Cut
from parallel.pipeline import PipelineConfig
from parallel.rules import Rules
from training.features import Features
from training.state import Model

Module = TypeVar("Module", bound=nnx.Module)


def functional(
    build: Callable[[jax.Array], Module],
    rules: Rules,
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
    cut: Cut,
    pipeline: PipelineConfig | None = None,
    scores: Callable[..., tuple[jax.Array, jax.Array]] | None = None,
    features: Callable[..., Features] | None = None,
) -> Model:
    """The `Model` of a module.

    Args:
      build: PRNG key -> module; traced, not run, until parameters are wanted.
      rules: the layout.
      loss: (module, batch, weights, key or None) -> (float32 sum, float32 sums).
      cut: the same in parts, each of them a function of the module, too.
      pipeline: how the stages work together.
      scores: (module, batch) -> what each target is worth (`Model.scores`).
      features: (module, batch, weights, key, layers) -> what its loss is made of
        (`Model.features`).
    """
    # What is static about the model, without computing anything.
    module = nnx.eval_shape(lambda: build(jax.random.key(0)))
    graph, axes = nnx.graphdef(module), logical_axes(module)

    def init(key: jax.Array) -> Any:
        def at_rest(array: jax.Array, names: str) -> jax.Array:
            return jax.reshard(array, rules.at_rest(names, array.shape))  # layers over stages

        return jax.tree.map(at_rest, nnx.to_pure_dict(nnx.state(build(key))), axes)

    def pure(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, *args: function(nnx.merge(graph, params), *args)

    parts = replace(cut, embed=pure(cut.embed), blocks=pure(cut.blocks), loss=pure(cut.loss))
    pure_scores, pure_features = (None if f is None else pure(f) for f in (scores, features))
    return Model(
        init, axes, pure(loss), rules, parts, pipeline, scores=pure_scores, features=pure_features
    )
