"""The smallest model there is, a line with one weight for each feature: a step compiles at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parallel.mesh import MeshConfig
from parallel.rules import ParallelConfig, make_rules
from training.micro_batches import Weights
from training.state import Model

D = 8
BAD = 99  # a target that makes the loss infinite


def line(slope: float = 1.0, start: float = 1.0) -> Model:
    """loss = sum over tokens of weight x slope x (token . w); a target of BAD adds infinity."""
    rules = make_rules(ParallelConfig(), MeshConfig(data=1).sizes(), {})
    spec = rules.at_rest("norm", (D,))
    init = lambda key: {"w": jnp.full(D, start, jnp.float32, out_sharding=spec)}

    def loss(
        params: Any, batch: dict[str, jax.Array], weights: Weights, key: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        w_D = params["w"].astype(jnp.float32)
        features_BTD = batch["tokens"][..., None] == jnp.arange(D)[None, None]
        y_BT = jnp.sum(features_BTD.astype(jnp.float32) * slope * w_D[None, None], -1)
        y_BT = y_BT * jnp.where(batch["targets"] == BAD, jnp.inf, 1.0)
        total = jnp.sum(weights.tokens_BT * y_BT)
        return total, {"nll_sum": jax.lax.stop_gradient(total)}

    return Model(init, {"w": "norm"}, loss, rules)


def tokens(
    rows: list[list[int]], *, targets: int = 0, segments: list[list[int]] | None = None
) -> dict[str, jax.Array]:
    """A batch of these tokens, all of which count if there are no segments."""
    array = np.asarray(rows, np.int32)
    counted = np.ones_like(array) if segments is None else np.asarray(segments, np.int32)
    batch = {"tokens": array, "targets": np.full_like(array, targets), "segments": counted}
    rules = line().rules
    return {name: jax.device_put(a, rules.spec("batch seq")) for name, a in batch.items()}
