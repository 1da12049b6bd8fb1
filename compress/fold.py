"""Scales of inputs folded into what comes before: a layer that computes the same.

x W = (x / s) (s W) for a positive s for each input. What makes x is divided by s: the gain of a
norm before q, k and v, or before up and gate; the columns of v before the output projection (one s
for the query heads that share a key/value head); the columns of up before down, where the
feed-forward is gated or its nonlinearity is relu.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.config import ModelConfig
from parallel.stored import Matrix

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Fold:
    """Matrices of one input, and what makes it.

    Attributes:
      targets: matrices whose rows are multiplied by s.
      sources: matrices whose columns, and vectors, that are divided by s.
      plus_one: the source is a gain that is stored minus one.
      repeats: query heads that share one of the source's heads; 1 elsewhere.
    """

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    plus_one: bool = False
    repeats: int = 1


def folds_of(config: ModelConfig, names: Sequence[str], prefix: str) -> list[Fold]:
    """What can be folded in a block, of the names that it has."""

    def there(*given: str) -> tuple[str, ...]:
        return tuple(prefix + name for name in given if prefix + name in names)

    folds = []
    if config.norm_position != "post":
        for norm, targets in (
            ("attention_norm", there("attention/query", "attention/key", "attention/value")),
            ("mlp_norm", there("mlp/up", "mlp/gate")),
        ):
            sources = there(f"{norm}/gain", f"{norm}/bias")
            folds.append(Fold(targets, sources, config.norm_plus_one))
    value = there("attention/value", "attention/value_bias")
    repeats = config.heads // config.kv_heads
    folds.append(Fold(there("attention/out"), value, repeats=repeats))
    if config.gated or config.activation == "relu":
        folds.append(Fold(there("mlp/down"), there("mlp/up", "mlp/up_bias")))
    return [fold for fold in folds if fold.targets and fold.sources]


def shared_scale(fold: Fold, scale_K: np.ndarray, head_dim: int) -> np.ndarray:
    """The scale with one number for all query heads of a group."""
    if fold.repeats == 1:
        return scale_K
    heads = scale_K.reshape(-1, fold.repeats, head_dim)
    mean = np.exp(np.mean(np.log(heads), axis=1, keepdims=True))
    return np.broadcast_to(mean, heads.shape).reshape(-1)


def apply_fold(
    fold: Fold, arrays: Arrays, matrices: dict[str, Matrix], scale_K: np.ndarray, head_dim: int
) -> Arrays:
    """The arrays that change, of one layer.

    Args:
      arrays: by name, [shape].
      scale_K: float32 > 0, as `shared_scale` gives it.
    """
    changed: Arrays = {}
    for name in fold.targets:
        matrix = matrices[name]
        w = arrays[name].reshape(matrix.rows, matrix.columns) * scale_K[:, None]
        changed[name] = w.reshape(arrays[name].shape).astype(np.float32)
    narrow = scale_K
    if fold.repeats > 1:
        narrow = scale_K.reshape(-1, fold.repeats, head_dim)[:, 0].reshape(-1)
    for name in fold.sources:
        array = changed.get(name, arrays[name])
        if name in matrices:
            matrix = matrices[name]
            new = array.reshape(matrix.rows, matrix.columns) / narrow
        elif fold.plus_one and name.endswith("/gain"):
            new = (array + 1) / narrow - 1
        else:
            new = array.reshape(-1) / narrow
        changed[name] = new.reshape(array.shape).astype(np.float32)
    return changed
