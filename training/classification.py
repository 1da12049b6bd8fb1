"""Classification of whole rows by several tasks: the loss of their heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from training.micro_batches import Batch

Sums = tuple[jax.Array, dict[str, jax.Array]]


def tasks_loss(logits: dict[str, jax.Array], batch: Batch, rows_B: jax.Array) -> Sums:
    """The sum over tasks of the weighted sum over rows of -log p(label).

    Args:
      logits: {task: [B, C]}, in any dtype.
      batch: holds `label_<task>`, int32 [B], below C.
      rows_B: float32, what each row counts (`Weights.rows_B`).

    Returns:
      The float32 scalar sum, and of every task the float32 sums `<task>_nll_sum` and
      `<task>_correct_sum` (rows whose label has the largest logit), without gradient.
    """
    total, sums = jnp.float32(0), {}
    for task, logits_BC in logits.items():
        label_B = batch[f"label_{task}"]
        log_p_BC = jax.nn.log_softmax(logits_BC.astype(jnp.float32), axis=-1)
        is_label_BC = jnp.arange(logits_BC.shape[1])[None] == label_B[:, None]
        nll_B = -jnp.sum(jnp.where(is_label_BC, log_p_BC, 0.0), -1)
        nll = jnp.sum(nll_B * rows_B)
        correct_B = (jnp.argmax(logits_BC, -1) == label_B).astype(jnp.float32)
        total = total + nll
        sums[f"{task}_nll_sum"] = lax.stop_gradient(nll)
        sums[f"{task}_correct_sum"] = jnp.sum(correct_B * rows_B)
    return total, sums
