"""Wanda: a weight counts as much as it is large and as its input is.

Sun et al. 2023, https://arxiv.org/abs/2306.11695. The score of a weight is |w_km| ||x_k||_2, and
scores are compared within an output channel: each loses the same share of its inputs. Nothing else
changes: no weight makes good for another.
"""

from __future__ import annotations

import numpy as np

from compress.prune import check_share, smallest_of_columns, smallest_of_fours


def wanda(
    w_KM: np.ndarray, squares_K: np.ndarray, sparsity: float, *, pattern: str = "unstructured"
) -> np.ndarray:
    """The matrix [K, M] with zeros, in its dtype.

    Args:
      w_KM: the matrix; each column is an output channel.
      squares_K: sums of x^2 over each input of the calibration text: the diagonal of X^T X.
      sparsity: the share of zeros of every column, in (0, 1).
      pattern: unstructured, or 2:4 (of every four inputs of a channel).

    Raises:
      ValueError: a share or pattern that cannot be.
    """
    check_share(sparsity, pattern)
    norms_K = np.sqrt(np.asarray(squares_K, np.float64))
    scores_KM = np.abs(np.asarray(w_KM, np.float64)) * norms_K[:, None]
    if pattern == "2:4":
        zero = smallest_of_fours(scores_KM)
    else:
        zero = smallest_of_columns(scores_KM, sparsity)
    return np.where(zero, np.zeros((), w_KM.dtype), w_KM)
