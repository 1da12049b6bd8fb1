"""Rounding to the nearest code, and how much of the range the scales cover."""

from __future__ import annotations

import numpy as np

from compress import host
from parallel.codes import Code

RATIOS = tuple(1 - i / 20 for i in range(13))  # of the range: 1 to 0.4


def nearest(
    code: Code, w_KM: np.ndarray, clip: np.ndarray | float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(what codes stand for float32 [K, M], codes [K, M], scales [G, M]).

    Args:
      clip: a scalar or [G, M].
    """
    rows, columns = w_KM.shape
    groups = code.groups(rows)
    parts = w_KM.reshape(groups, rows // groups, columns)
    clips = np.broadcast_to(np.asarray(clip, np.float32), (groups, columns))
    scales = [host.scales_of(code, p, c) for p, c in zip(parts, clips, strict=True)]
    codes = [host.encode(code, p, s) for p, s in zip(parts, scales, strict=True)]
    values = [host.decode(code, q, s) for q, s in zip(codes, scales, strict=True)]
    whole = lambda found: np.concatenate(found).reshape(rows, columns)
    return whole(values), whole(codes), np.stack(scales)


def best_clip(code: Code, w_KM: np.ndarray, weight_K: np.ndarray | None = None) -> np.ndarray:
    """The part of its range that each scale covers best, [G, M]: least squared error.

    Args:
      weight_K: what a row's error counts, such as the mean square of its input; None: all alike.
    """
    rows, columns = w_KM.shape
    groups = code.groups(rows)
    best = np.ones((groups, columns), np.float32)
    least = np.full((groups, columns), np.inf)
    weights = np.ones(rows) if weight_K is None else np.asarray(weight_K, np.float64)
    for ratio in RATIOS:
        values, _, _ = nearest(code, w_KM, ratio)
        error = weights[:, None] * (values.astype(np.float64) - w_KM) ** 2
        error = error.reshape(groups, rows // groups, columns).sum(1)
        better = error < least
        best, least = np.where(better, np.float32(ratio), best), np.where(better, error, least)
    return best
