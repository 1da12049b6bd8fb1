"""Matrices as two factors, of the largest singular values: of the weights, or of the outputs.

For inputs with moment H = X^T X = L L^T the outputs change by |L^T (W - A B)|. So the best factors
of a rank are those of L^T W, with L taken off again (SVD-LLM, Wang et al. 2024,
https://arxiv.org/abs/2403.07378, section 3.1). ASVD (Yuan et al. 2023,
https://arxiv.org/abs/2312.05821) takes a diagonal in the place of L: mean|x_k|^a. In float64 on the
host. Two factors save where r < KM / (K + M), and are never multiplied together again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress.budget import Candidates, Option
from compress.calibration import Calibration
from compress.idle import refuse_idle
from compress.result import Result
from compress.walk import Layer, check_walk, walk
from compress.watch import Inputs
from parallel.forms import Form
from parallel.low_rank import largest_rank
from parallel.rules import is_stacked
from training.naming import named
from training.state import Model

METHODS = ("svd", "whitened", "asvd")
FLOOR = 1e-6  # of a moment's largest eigenvalue; what a float32 sum says below that is rounding
CHOICES = 8  # ranks that a budget chooses from, besides the array itself


@dataclass(frozen=True)
class Factorize:
    """How matrices become factors.

    Attributes:
      method: svd (of the weights), whitened (SVD-LLM) or asvd.
      exponent: of ASVD's scale.
    """

    method: str = "whitened"
    exponent: float = 0.5

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"--method={self.method}: choose one of {', '.join(METHODS)}")
        if not 0 <= self.exponent <= 1:
            raise ValueError(f"--exponent={self.exponent}: between 0 and 1")
        refuse_idle(self, "exponent", "method", "asvd")

    def weighting(self, rows: int, inputs: Inputs | None) -> tuple[np.ndarray, np.ndarray]:
        """(what W is multiplied by before, its inverse), float64 [K, K]."""
        if self.method == "svd" or inputs is None:
            return np.eye(rows), np.eye(rows)
        if self.method == "asvd":
            mean = np.asarray(inputs.sizes, np.float64)
            scale = np.maximum(mean, 1e-6 * float(mean.max(initial=1e-24))) ** self.exponent
            return np.diag(scale), np.diag(1 / scale)
        squares, vectors = np.linalg.eigh(np.array(inputs.moment, np.float64))
        root = np.sqrt(np.maximum(squares, FLOOR * max(float(squares[-1]), 1e-30)))
        return root[:, None] * vectors.T, vectors / root

    def factors(
        self, w_KM: np.ndarray, rank: int, inputs: Inputs | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """A [K, r] and B [r, M], float32, alike in norm."""
        before, back = self.weighting(len(w_KM), inputs)
        u, s, v = np.linalg.svd(before @ np.asarray(w_KM, np.float64), full_matrices=False)
        root = np.sqrt(s[:rank])
        into, out_of = back @ (u[:, :rank] * root), root[:, None] * v[:rank]
        return into.astype(np.float32), out_of.astype(np.float32)


def factorize(
    how: Factorize,
    forms: Mapping[str, Sequence[Form]],
    model: Model,
    params: Any,
    text: Calibration | None,
    *,
    scratch: Path | None = None,
) -> Result:
    """The model's matrices as factors, of the ranks that their forms give.

    Args:
      forms: name -> form of each layer, of rank or none.
      text: None for plain svd.
      scratch: an empty folder for layers that are done (`Result`).
    """
    result = Result(model, params, scratch)

    def made(name: str, layer: int, w: np.ndarray, inputs: Inputs | None) -> np.ndarray:
        form, matrix = forms[name][layer], result.matrix(name)
        if form.kind == "none":
            result.put(name, layer, w)
            return w
        flat = w.reshape(matrix.rows, matrix.columns)
        into, out_of = how.factors(flat, form.rank, inputs)
        result.put(name, layer, form.factors(matrix, jnp.asarray(into), jnp.asarray(out_of)), form)
        return (into @ out_of).reshape(w.shape)

    if text is not None:
        check_walk(model, f"--method={how.method}", forms)

        def visit(layer: Layer) -> dict[str, np.ndarray]:
            return {
                name: made(name, layer.number, layer.weights[name], inputs)
                for name, inputs in layer.inputs.items()
                if name in forms
            }

        walk(text, params, visit)
        return result
    for name, array in named(params).items():
        if name not in forms:
            continue
        stacked = is_stacked(result.axes[name])
        for layer in range(result.layers(name)):
            one = jax.reshard(array[layer] if stacked else array, jax.P())
            made(name, layer, np.asarray(one, np.float32), None)
    return result


def rank_candidates(
    how: Factorize, names: Sequence[str], model: Model, params: Any, text: Calibration
) -> Candidates:
    """What each rank would cost in each layer, by one walk through the dense model.

    The cost of a rank is the part of the outputs' squares in the singular values that it leaves
    out; the array itself costs none.
    """
    check_walk(model, "--keep", names)
    result = Result(model, params)
    found: Candidates = {name: [[] for _ in range(result.layers(name))] for name in names}

    def visit(layer: Layer) -> dict[str, jax.Array]:
        for name, inputs in layer.inputs.items():
            if name not in found:
                continue
            matrix = result.matrix(name)
            w = np.asarray(layer.weights[name], np.float64).reshape(matrix.rows, matrix.columns)
            before, _ = Factorize("whitened").weighting(matrix.rows, inputs)
            squares = np.linalg.svd(before @ w, compute_uv=False) ** 2
            left = 1 - np.cumsum(squares) / max(squares.sum(), 1e-30)
            item = 32 * (matrix.rows + matrix.columns)
            options = found[name][layer.number]
            for rank in choices(largest_rank(matrix)):
                form = Form("rank", rank=rank)
                options.append(Option(form, rank * item, w.size, float(left[rank - 1])))
            options.append(Option(Form("none"), 32 * w.size, w.size, 0.0))
        return {}

    walk(text, params, visit)
    return found


def choices(most: int) -> list[int]:
    """Ranks that a budget chooses from: even steps up to the largest that saves."""
    step = max(1, most // CHOICES)
    step = step // 8 * 8 or step
    return list(range(step, most + 1, step))
