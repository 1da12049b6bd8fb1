"""The largest |x| that inputs in codes reach, where all tokens share one scale.

absmax keeps every input seen; a percentile cuts the rarest off; mse takes the limit with the least
squared error of the inputs seen (as in Banner et al. 2018, https://arxiv.org/abs/1810.05723, by
search instead of a distribution). The last two go by a histogram of |x| with eight bins an octave.
"""

from __future__ import annotations

import numpy as np

from compress.watch import Inputs, edges
from parallel.code_products import CODES


def limit_of(inputs: Inputs, kind: str, ranges: str, percentile: float) -> np.float32:
    """The limit of one matrix's inputs.

    Args:
      kind: "int8" or "fp8".
      ranges: "absmax", "percentile" or "mse".
      percentile: of |x|.
    """
    largest = float(np.max(inputs.largest))
    if ranges == "absmax" or inputs.histogram is None or largest == 0:
        return np.float32(largest)
    counts, upper = np.asarray(inputs.histogram, np.float64), edges()
    if ranges == "percentile":
        part = np.cumsum(counts) / counts.sum()
        reached = upper[1:][np.searchsorted(part, percentile / 100)]
        return np.float32(min(reached, largest))
    middle = np.where(counts > 0, (upper[:-1] + np.minimum(upper[1:], largest)) / 2, 0.0)
    limits = largest * 2.0 ** (-np.arange(0, 8, 0.25))
    errors = [float(np.sum(counts * _rounding(middle, limit, kind) ** 2)) for limit in limits]
    return np.float32(limits[int(np.argmin(errors))])


def _rounding(sizes: np.ndarray, limit: float, kind: str) -> np.ndarray:
    """The error of |x| on average: a step's root mean square below the limit, what is cut above."""
    code = CODES[kind]
    cut = np.maximum(sizes - limit, 0.0)
    step = limit / code.limit if kind == "int8" else np.maximum(sizes, 1e-30) / 16
    return np.where(cut > 0, cut, step / np.sqrt(12))
