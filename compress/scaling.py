"""Scales of inputs before rounding: AWQ and SmoothQuant, each a function that keeps the layer's.

AWQ (Lin et al. 2023, https://arxiv.org/abs/2306.00978): s_k = mean|x_k|^a, the exponent searched
for the least error of the outputs; what is multiplied is rounded less coarsely. SmoothQuant (Xiao
et al. 2022, https://arxiv.org/abs/2211.10438): s_k = max|x_k|^a / max|w_k|^(1 - a), which moves
what is hard to round from inputs to weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compress.gptq import output_error
from compress.round import nearest
from compress.watch import Inputs
from parallel.codes import Code

EXPONENTS = tuple(i / 10 for i in range(11))


def awq_scale(
    codes: Sequence[Code],
    weights_KM: Sequence[np.ndarray],
    inputs: Inputs,
    shared: object,
) -> np.ndarray:
    """The scale [K] of one input whose rounding changes the outputs least; ones where none helps.

    Args:
      codes: of each matrix.
      weights_KM: matrices of that input.
      shared: scale [K] -> scale [K], what a fold asks of it.
    """
    mean = np.asarray(inputs.sizes, np.float64) / max(float(inputs.tokens), 1.0)
    mean = np.maximum(mean, 1e-8 * max(mean.max(), 1e-30))
    best, least = np.ones(len(mean), np.float32), np.inf
    for exponent in EXPONENTS:
        scale = normalised(shared(mean**exponent))  # type: ignore[operator]
        error = 0.0
        for code, w in zip(codes, weights_KM, strict=True):
            rounded, _, _ = nearest(code, w * scale[:, None])
            error += output_error(inputs.moment, rounded / scale[:, None] - w)
        if error < least:
            best, least = scale, error
    return best


def smooth_scale(
    weights_KM: Sequence[np.ndarray], inputs: Inputs, exponent: float = 0.5
) -> np.ndarray:
    """SmoothQuant's scale [K] of one input of several matrices."""
    largest = np.maximum(np.asarray(inputs.largest, np.float64), 1e-5)
    weight = np.max([np.max(np.abs(w), axis=1) for w in weights_KM], axis=0)
    return normalised(largest**exponent / np.maximum(weight, 1e-5) ** (1 - exponent))


def normalised(scale: np.ndarray) -> np.ndarray:
    """Of geometric mean one, float32: neither side grows as a whole."""
    return (scale / np.exp(np.mean(np.log(scale)))).astype(np.float32)


def scaled_inputs(inputs: Inputs, scale_K: np.ndarray) -> Inputs:
    """The sums of x / s; the histogram, which knows nothing of k, is left out."""
    s = scale_K.astype(np.float64)
    return inputs._replace(
        moment=(inputs.moment / np.outer(s, s)).astype(np.float32),
        sizes=(inputs.sizes / s).astype(np.float32),
        largest=(inputs.largest / s).astype(np.float32),
        histogram=None,
    )
