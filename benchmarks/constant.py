"""The best predictor that does not look at what it is given: a distribution, fitted by counting.

Of tokens there are three, and the lowest is taken: one distribution of targets, one of targets at
each position of a row, one of whole rows. Scored on other rows than it was fitted on, as the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

Batch = Mapping[str, np.ndarray]
# Weights of the distribution of all positions beside the counts at one; that of the lowest loss on
# the scored rows is taken, to the predictor's advantage.
PRIORS = (1.0, 10.0, 100.0, 1000.0)


def constant_losses(
    fitted: Iterable[Batch], scored: Sequence[Batch], vocab_size: int, tasks: Mapping[str, int]
) -> dict[str, tuple[float, str]]:
    """What is predicted, "tokens" or a task -> (nats, what the distribution is of).

    Args:
      fitted: batches as the loader gives them: the rows that distributions are counted on.
      scored: those of which the loss is.
      vocab_size: ids of targets are below it.
      tasks: name -> classes.
    """
    fitted = list(fitted)
    found: dict[str, tuple[float, str]] = {}
    if "targets" in scored[0]:
        by_token = position_losses(fitted, scored, vocab_size) | row_loss(fitted, scored)
        of = min(by_token, key=lambda name: by_token[name])
        found["tokens"] = by_token[of], of
    for task, classes in tasks.items():
        name = f"label_{task}"
        labels = [np.concatenate([b[name][b[name] >= 0] for b in bs]) for bs in (fitted, scored)]
        counts = np.bincount(labels[0], minlength=classes) + 1.0
        loss = -np.log(counts / counts.sum())[labels[1]].mean()
        found[task] = float(loss), "classes"
    return found


def position_losses(
    fitted: Sequence[Batch], scored: Sequence[Batch], vocab_size: int
) -> dict[str, float]:
    """Nats a token of one distribution of tokens, and of one for each position."""
    counts_TV = count_tokens(fitted, vocab_size)
    scored_TV = count_tokens(scored, vocab_size)
    tokens_V = counts_TV.sum(0) + 1.0
    tokens_V /= tokens_V.sum()

    def loss(p_TV: np.ndarray) -> float:
        return float(-(scored_TV * np.log(p_TV)).sum() / scored_TV.sum())

    seen_T1 = counts_TV.sum(1, keepdims=True)
    by_position = [(counts_TV + k * tokens_V) / (seen_T1 + k) for k in PRIORS]
    return {"tokens": loss(tokens_V[None]), "positions": min(map(loss, by_position))}


def row_loss(fitted: Sequence[Batch], scored: Sequence[Batch]) -> dict[str, float]:
    """Nats a token of a distribution of whole rows; nothing where a scored row was never seen."""
    seen = Counter(row for batch in fitted for row in rows_of(batch))
    rows = [row for batch in scored for row in rows_of(batch)]
    if any(row not in seen for row in rows):
        return {}
    p = np.array([seen[row] for row in rows]) / seen.total()
    tokens = sum(int(counted_of(batch).sum()) for batch in scored)
    return {"rows": float(-np.log(p).sum() / tokens)}


def count_tokens(batches: Sequence[Batch], vocab_size: int) -> np.ndarray:
    """How often each token is a target that counts, at each position: float64 [T, V]."""
    total_TV = np.zeros((batches[0]["targets"].shape[1], vocab_size))
    for batch in batches:
        counted_BT = counted_of(batch)
        flat = np.nonzero(counted_BT)[1] * vocab_size + batch["targets"][counted_BT]
        total_TV += np.bincount(flat, minlength=total_TV.size).reshape(total_TV.shape)
    return total_TV


def rows_of(batch: Batch) -> Iterable[bytes]:
    """Every row's targets that count, as something that can be compared."""
    counted_BT = counted_of(batch)
    there = counted_BT.any(1)
    return (row.tobytes() for row in np.where(counted_BT, batch["targets"], -1)[there])


def counted_of(batch: Batch) -> np.ndarray:
    """Which targets count: bool [B, T]."""
    return (batch["counted"] if "counted" in batch else batch["segments"]) > 0
