"""SparseGPT: rows are pruned in turn, and those that are left make good for what each one lost.

Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774. With H = X^T X of the inputs, damped,
and U the upper Cholesky factor of its inverse, leaving out w_km costs w_km^2 / U_kk^2, and its
error e = w_km / U_kk is taken from every later row j by U_kj e. What is left out is chosen when the
rows before are done: of a block of 128 rows together, so that a channel may lose more than another,
or of every four rows of a channel.

On the host in float64, so that neither the layout nor an accelerator's arithmetic decides a zero.
"""

from __future__ import annotations

import numpy as np

from compress.gptq import inverse_factor
from compress.prune import check_share, smallest_of_fours

BLOCK = 128


def sparsegpt(
    w_KM: np.ndarray,
    moment_KK: np.ndarray,
    sparsity: float,
    *,
    pattern: str = "unstructured",
    damp: float = 0.01,
    block: int = BLOCK,
) -> np.ndarray:
    """The matrix [K, M] with zeros, its other weights adjusted, float32.

    Args:
      w_KM: the matrix; each column is an output channel.
      moment_KK: sum of x x^T over its inputs. Inputs that are always zero lose their rows.
      sparsity: the share of zeros of every block of rows, in (0, 1).
      pattern: unstructured or 2:4.
      damp: of the mean of the moment's diagonal, added to it.
      block: rows whose zeros are chosen together, a multiple of 4 for 2:4.

    Raises:
      ValueError: a share or pattern that cannot be, or rows that are no fours.
    """
    check_share(sparsity, pattern)
    w = np.array(w_KM, np.float64)
    rows, columns = w.shape
    if pattern == "2:4" and rows % 4:
        raise ValueError(f"2:4: {rows} rows are no multiple of 4; choose an unstructured pattern")
    assert block % 4 == 0, block
    factor = inverse_factor(moment_KK, damp, w)
    roots = np.diag(factor)[:, None]
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        errors = np.zeros((stop - start, columns))
        zero = np.zeros((stop - start, columns), bool)
        if pattern != "2:4":
            zero = _cheapest((w[start:stop] / roots[start:stop]) ** 2, sparsity)
        for k in range(start, stop):
            at = k - start
            if pattern == "2:4" and k % 4 == 0:
                zero[at : at + 4] = smallest_of_fours((w[k : k + 4] / roots[k : k + 4]) ** 2)
            errors[at] = np.where(zero[at], w[k], 0.0) / factor[k, k]
            w[k + 1 : stop] -= np.outer(factor[k, k + 1 : stop], errors[at])
        w[stop:] -= factor[start:stop, stop:].T @ errors
        w[start:stop][zero] = 0.0
    return w.astype(np.float32)


def _cheapest(costs_KM: np.ndarray, sparsity: float) -> np.ndarray:
    """Whether a weight is one of the cheapest of all, bool; the first of equal ones."""
    order = np.argsort(costs_KM, axis=None, kind="stable")[: round(sparsity * costs_KM.size)]
    mask = np.zeros(costs_KM.size, bool)
    mask[order] = True
    return mask.reshape(costs_KM.shape)
