"""GPTQ: rows are rounded in turn, and those that are left make good for what each one lost.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323. With H = X^T X of the inputs and U the upper
Cholesky factor of its inverse, row k's error e = (w_k - q_k) / U_kk is taken from every later row j
by U_kj e. Rows go in blocks: within one at once, beyond it in one product.

On the host in float64, so that neither the layout nor an accelerator's arithmetic decides a code.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import lapack

from compress import host
from parallel.codes import Code

BLOCK = 128


def gptq(
    code: Code,
    w_KM: np.ndarray,
    moment_KK: np.ndarray,
    *,
    damp: float = 0.01,
    clip: np.ndarray | float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes [K, M] and scales [G, M] of a matrix.

    Args:
      w_KM: the matrix.
      moment_KK: sum of x x^T over its inputs.
      damp: of the mean of the moment's diagonal, added to it.
      clip: the part of the range that scales cover; a scalar or [G, M].
    """
    w = np.array(w_KM, np.float64)
    rows, columns = w.shape
    group = code.group or rows
    factor = inverse_factor(moment_KK, damp, w)
    clips = np.broadcast_to(np.asarray(clip, np.float32), (rows // group, columns))
    # Groups begin where a block does, so that their rows are up to date.
    block = BLOCK if BLOCK % group == 0 else group if code.group else BLOCK
    codes: np.ndarray | None = None
    scales: list[np.ndarray] = []
    if not code.group:
        scales = [host.scales_of(code, w, clips[0])]
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        errors = np.zeros((stop - start, columns))
        for k in range(start, stop):
            if code.group and k % group == 0:
                scales.append(host.scales_of(code, w[k : k + group], clips[k // group]))
            rounded = host.encode(code, w[k], scales[-1])
            if codes is None:
                codes = np.zeros((rows, columns), rounded.dtype)
            codes[k] = rounded
            error = (w[k] - host.decode(code, rounded, scales[-1])) / factor[k, k]
            w[k + 1 : stop] -= np.outer(factor[k, k + 1 : stop], error)
            errors[k - start] = error
        w[stop:] -= factor[start:stop, stop:].T @ errors
    assert codes is not None
    return codes, np.stack(scales)


def inverse_factor(moment_KK: np.ndarray, damp: float, w_KM: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor of the damped moment's inverse, float64 [K, K].

    Of an input that is always zero the rows of `w_KM` are made zero: they are never seen.
    """
    # With all rows and columns in reverse H = L L^T, L^-1 is the factor in reverse: no inverse of H
    # is made, and there is one matrix, in which LAPACK works.
    reverse = np.array(moment_KK[::-1, ::-1], np.float64, order="F")
    diagonal = np.diag(reverse).copy()
    dead = diagonal == 0
    w_KM[dead[::-1]] = 0.0
    diagonal[dead] = 1.0
    diagonal += damp * np.mean(diagonal)
    reverse[np.diag_indices_from(reverse)] = diagonal
    lower, failed = lapack.dpotrf(reverse, lower=1, overwrite_a=1)
    if not failed:
        lower, failed = lapack.dtrtri(lower, lower=1, overwrite_c=1)
    assert not failed, failed
    return lower[::-1, ::-1]


def output_error(moment_KK: np.ndarray, change_KM: np.ndarray) -> float:
    """The sum over tokens of squared changes of the output, of a change of the matrix."""
    change = np.asarray(change_KM, np.float64)
    return float(np.sum(change * (np.asarray(moment_KK, np.float64) @ change)))
