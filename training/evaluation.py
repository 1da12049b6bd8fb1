"""Loss, perplexity, bits per byte and accuracy on held-out rows, whatever the layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from parallel.precision import PrecisionConfig
from parallel.zero import for_model
from training.micro_batches import Batch, counted
from training.state import Model

OF_TOKENS = ("perplexity", "bits_per_byte")
COUNTS = ("tokens", "bytes", "rows")
NLL = "_nll"  # the end of a sum's name that begins with a task's


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
    """(master params, batch) -> float32 sums; no dropout.

    Of a model that predicts tokens they are `nll`, `correct`, `tokens` and `bytes`, of one with
    tasks `<task>_nll` and `<task>_correct` of each, and `rows`.

    Args:
      token_bytes: int [vocab], how many bytes of text each token stands for.
    """
    sizes = np.asarray(token_bytes, np.float32)

    def step(params: Any, batch: Batch) -> dict[str, jax.Array]:
        leaves, build = for_model(params, model.axes, model.rules, precision.compute)
        ones = counted(batch)
        _, sums = model.loss(build(leaves), batch, ones, None)
        named = {name.removesuffix("_sum"): value for name, value in sums.items()}
        wanted = {n: v for n, v in named.items() if n.endswith(("nll", "correct"))}
        if any(name.endswith(NLL) for name in wanted):
            wanted["rows"] = jnp.sum(ones.rows_B)
        if "nll" in wanted:
            table = jnp.asarray(sizes)
            spec = jax.typeof(ones.tokens_BT).sharding.spec
            sizes_BT = table.at[batch["targets"]].get(out_sharding=spec)
            wanted["tokens"] = jnp.sum(ones.tokens_BT)
            wanted["bytes"] = jnp.sum(sizes_BT * ones.tokens_BT)
        return wanted

    return step


def evaluate(
    eval_step: Callable[[Any, Batch], dict[str, jax.Array]], params: Any, batches: Iterable[Batch]
) -> dict[str, float]:
    """Runs `eval_step` over batches and reports means.

    Returns:
      Of tokens: `loss` (nats a token), `perplexity`, `bits_per_byte`, `accuracy`, `tokens`,
      `bytes`. Of tasks: `<task>_loss` (nats a row) and `<task>_accuracy` of each, `rows`; without
      tokens `loss` is the sum of theirs.

    Raises:
      ValueError: there was nothing to score.
    """
    sums = [eval_step(params, batch) for batch in batches]  # dispatched without waiting
    total = {name: math.fsum(float(s[name]) for s in sums) for name in (sums[0] if sums else ())}
    if not total or min(total.get("tokens", 1), total.get("rows", 1)) == 0:
        raise ValueError(
            "config.data.eval_path: the held-out files hold no token to score; give longer ones"
        )
    tasks = _of_tasks(total)
    return (_of_tokens(total) if "tokens" in total else {"loss": _sum_of_losses(tasks)}) | tasks


def _of_tokens(total: dict[str, float]) -> dict[str, float]:
    loss = total["nll"] / total["tokens"]
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": total["nll"] / math.log(2) / max(total["bytes"], 1.0),
        "accuracy": total["correct"] / total["tokens"],
        "tokens": int(total["tokens"]),
        "bytes": int(total["bytes"]),
    }


def _of_tasks(total: dict[str, float]) -> dict[str, float]:
    """Nothing where there are none."""
    found: dict[str, float] = {}
    for task in [name.removesuffix(NLL) for name in total if name.endswith(NLL)]:
        found[f"{task}_loss"] = total[f"{task}_nll"] / total["rows"]
        found[f"{task}_accuracy"] = total[f"{task}_correct"] / total["rows"]
    return found | ({"rows": int(total["rows"])} if found else {})


def _sum_of_losses(tasks: dict[str, float]) -> float:
    return sum(value for name, value in tasks.items() if name.endswith("_loss"))


def results(config: ModelConfig) -> tuple[str, ...]:
    """What `evaluate` reports of a model of which lower is better."""
    tasks = tuple(f"{task}_loss" for task, _ in config.tasks)
    return ("loss", *(OF_TOKENS if config.token_head else ()), *tasks)
