"""Weights made zero layer by layer, by what calibration text says of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress.bcoo import refuse_bcoo
from compress.calibration import Calibration
from compress.idle import refuse_idle
from compress.prune import check_share, prune_by_magnitude
from compress.result import Result
from compress.sparsegpt import sparsegpt
from compress.walk import Layer, check_walk, walk
from compress.wanda import wanda
from parallel.forms import Form
from training.magnitude import SCOPES
from training.naming import named
from training.state import Model

METHODS = ("magnitude", "wanda", "sparsegpt")


@dataclass(frozen=True)
class Prune:
    """Which weights become zero.

    Attributes:
      method: magnitude, wanda or sparsegpt.
      sparsity: the share of zeros.
      pattern: unstructured or 2:4.
      scope: of magnitude: layer or global (one threshold for all matrices).
      packed: 2:4 weights are stored as what is left of them and its places.
      damp: of SparseGPT.
    """

    method: str = "sparsegpt"
    sparsity: float = 0.5
    pattern: str = "unstructured"
    scope: str = "layer"
    packed: bool = False
    damp: float = 0.01

    def __post_init__(self) -> None:
        for name, right in (
            ("method", METHODS),
            ("scope", SCOPES),
            ("pattern", ("unstructured", "2:4")),
        ):
            value = getattr(self, name)
            if value not in right:
                raise ValueError(f"--{name}={value}: choose one of {', '.join(right)}")
        check_share(self.sparsity, self.pattern)
        if not 0 < self.damp < 1:
            raise ValueError(f"--damp={self.damp}: a part of the mean, between 0 and 1")
        refuse_idle(self, "damp", "method", "sparsegpt")
        if self.scope == "global" and self.pattern == "2:4":
            raise ValueError(
                "--scope=global: 2:4 chooses among four rows of a channel; leave it at layer"
            )
        if self.scope == "global" and self.method != "magnitude":
            raise ValueError(
                f"--scope=global: {self.method} compares within a channel or a block; give "
                f"--method=magnitude"
            )

    @property
    def calibrated(self) -> bool:
        """Whether it reads text."""
        return self.method != "magnitude"


def prune(
    how: Prune,
    names: Collection[str],
    model: Model,
    params: Any,
    text: Calibration | None,
    *,
    scratch: Path | None = None,
) -> Result:
    """The model with zeros in some matrices.

    Args:
      names: canonical names of the matrices.
      model: dense; call it under its mesh.
      params: master parameters; they stay.
      text: None for magnitude.
      scratch: an empty folder for layers that are done (`Result`).

    Raises:
      ValueError: to be packed with zeros anywhere, or a model whose layers cannot be walked.
    """
    result, form = Result(model, params, scratch), Form("2:4")
    if how.packed and how.pattern != "2:4":
        largest = max(names, key=lambda name: np.prod(result.shapes[name]))
        matrix = result.matrix(largest)
        left = matrix.rows * matrix.columns - round(how.sparsity * matrix.rows * matrix.columns)
        item = named(params)[largest].dtype.itemsize
        refuse_bcoo(largest, (matrix.rows, matrix.columns), left, item)
    packed = jax.jit(lambda matrix, w: form.store(matrix, matrix.flat(w)), static_argnums=0)

    def put(name: str, layer: int, w: np.ndarray) -> None:
        if how.packed:
            matrix = result.matrix(name)
            form.check(matrix, f"--pattern=2:4: {name}")
            result.put(name, layer, packed(matrix, jnp.asarray(w)), form)
        else:
            result.put(name, layer, w)

    if not how.calibrated:
        ways = dict(scope=how.scope, pattern=how.pattern)
        for name, layer, one in prune_by_magnitude(params, model.axes, names, how.sparsity, **ways):
            put(name, layer, np.asarray(jax.reshard(one, jax.P())))
        return result
    check_walk(model, f"--method={how.method}", names)

    def visit(layer: Layer) -> dict[str, np.ndarray]:
        changed = {}
        for name, inputs in layer.inputs.items():
            if name not in names:
                continue
            matrix, w = result.matrix(name), layer.weights[name]
            flat = w.reshape(matrix.rows, matrix.columns)
            if how.method == "wanda":
                squares = np.diag(inputs.moment)
                made = wanda(flat, squares, how.sparsity, pattern=how.pattern)
            else:
                made = sparsegpt(
                    flat, inputs.moment, how.sparsity, pattern=how.pattern, damp=how.damp
                )
            made = made.reshape(w.shape)
            put(name, layer.number, made)
            changed[name] = made
        return changed

    assert text is not None
    walk(text, params, visit)
    return result


def activation_scores(
    heads: int, head_dim: int, layer: Layer, prefix: str
) -> tuple[np.ndarray, np.ndarray]:
    """How much of every head and channel reaches the residual stream, float64 [N], [F].

    The mean |x| that comes into the last product of a sublayer times the norm of its row there
    (Minitron, Muralidharan et al. 2024, section 2.2, https://arxiv.org/abs/2407.14679, sums |x|
    alone).
    """

    def rows(name: str) -> np.ndarray:
        inputs = layer.inputs[prefix + name]
        w = np.asarray(layer.weights[prefix + name], np.float64)
        flat = w.reshape(len(inputs.sizes), -1)
        return np.asarray(inputs.sizes, np.float64) * np.linalg.norm(flat, axis=1)

    return rows("attention/out").reshape(heads, head_dim).sum(-1), rows("mlp/down")
