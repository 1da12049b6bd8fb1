"""Rounding on the host, in NumPy: what solvers that go row by row do at each row.

The same codes and scales as `parallel.codes`, which a test holds.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from parallel.codes import NF4, TINY, Code, of_zeros

_MIDDLES = (NF4[1:] + NF4[:-1]) / 2


def scales_of(code: Code, w_KM: np.ndarray, clip: np.ndarray | float = 1.0) -> np.ndarray:
    """The scale [M] of rows that share one, in `code.scale_dtype`."""
    largest = np.max(np.abs(w_KM), axis=0).astype(np.float32)
    scales = largest * np.asarray(clip, np.float32) / np.float32(code.limit)
    scales = np.where(scales < TINY, np.float32(of_zeros(code)), scales)
    if code.scale_dtype == "float16":
        scales = np.clip(scales, 2.0**-24, 65504.0)
    return scales.astype(code.scale_dtype)


def encode(code: Code, w: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Codes of rows [..., M] with a scale [M], as int8 or float8."""
    x = np.asarray(w, np.float32) / scales.astype(np.float32)
    if code.kind == "nf4":
        return np.searchsorted(_MIDDLES, x, side="left").astype(np.int8)
    if code.kind == "fp8":
        return np.clip(x, -code.limit, code.limit).astype(ml_dtypes.float8_e4m3fn)
    half = 2 ** (code.bits - 1)
    return np.clip(np.round(x), -half, half - 1).astype(np.int8)


def decode(code: Code, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The float32 values of codes with a scale [M]."""
    values = NF4[codes] if code.kind == "nf4" else codes.astype(np.float32)
    return values * scales.astype(np.float32)
