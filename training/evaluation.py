"""Loss, perplexity and bits per byte on held-out text, whatever the layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parallel.precision import PrecisionConfig
from parallel.zero import for_model
from training.state import Model

Batch = dict[str, jax.Array]
RESULTS = ("loss", "perplexity", "bits_per_byte")  # lower is better


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out files (`config.eval`).

    Attributes:
      every: training steps between two evaluations; 0: at the end alone.
      batches: batches of `config.data.batch_size` sequences, the same each time.
    """

    every: int = 0
    batches: int = 16

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"config.eval.every = {self.every}: 0 (at the end alone) or more")
        if self.batches < 1:
            raise ValueError(f"config.eval.batches = {self.batches}: at least 1")


def make_eval_step(
    model: Model, precision: PrecisionConfig, token_bytes: np.ndarray
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """(master params, batch) -> float32 sums `nll`, `correct`, `tokens`, `bytes`; no dropout.

    Args:
      token_bytes: int [vocab], how many bytes of text each token stands for.
    """
    sizes = np.asarray(token_bytes, np.float32)

    def step(params: Any, batch: Batch) -> dict[str, jax.Array]:
        leaves, build = for_model(params, model.axes, model.rules, precision.compute)
        counted = (batch["segments"] > 0).astype(jnp.float32)
        _, sums = model.loss(build(leaves), batch, counted, None)
        table = jnp.asarray(sizes)
        spec = jax.typeof(counted).sharding.spec
        sizes_BT = table.at[batch["targets"]].get(out_sharding=spec)
        return {
            "nll": sums["nll_sum"],
            "correct": sums["correct_sum"],
            "tokens": jnp.sum(counted),
            "bytes": jnp.sum(sizes_BT * counted),
        }

    return step


def evaluate(
    eval_step: Callable[[Any, Batch], dict[str, jax.Array]], params: Any, batches: Iterable[Batch]
) -> dict[str, float]:
    """Runs `eval_step` over batches and reports means.

    Returns:
      `loss` (nats a token), `perplexity`, `bits_per_byte`, `accuracy`, `tokens`, `bytes`.

    Raises:
      ValueError: there was no token to score.
    """
    sums = [eval_step(params, batch) for batch in batches]  # dispatched without waiting
    total = {name: math.fsum(float(s[name]) for s in sums) for name in (sums[0] if sums else ())}
    if not total or total["tokens"] == 0:
        raise ValueError(
            "config.data.eval_path: the held-out files hold no token to score; give longer ones"
        )
    loss = total["nll"] / total["tokens"]
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": total["nll"] / math.log(2) / max(total["bytes"], 1.0),
        "accuracy": total["correct"] / total["tokens"],
        "tokens": int(total["tokens"]),
        "bytes": int(total["bytes"]),
    }
