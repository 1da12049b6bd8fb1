"""Weights rounded to codes: to the nearest, or as calibration text says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress import host
from compress.calibration import Calibration
from compress.fold import apply_fold, folds_of, shared_scale
from compress.gptq import gptq
from compress.idle import refuse_idle
from compress.ranges import limit_of
from compress.result import Result
from compress.round import best_clip, nearest
from compress.scaling import awq_scale, scaled_inputs, smooth_scale
from compress.walk import STACK, Layer, check_walk, walk
from compress.watch import Inputs
from models.config import ModelConfig
from parallel.forms import Form, written
from parallel.quantised import Quantised, quantised
from parallel.rules import is_stacked
from training.naming import named
from training.state import Model
from training.stored import dense_layer

Tree = Any
METHODS = ("rtn", "gptq", "awq", "smoothquant")
CLIPS = ("absmax", "mse")
RANGES = ("absmax", "percentile", "mse")


@dataclass(frozen=True)
class Quantize:
    """How weights become codes.

    Attributes:
      method: rtn (to the nearest), gptq, awq or smoothquant.
      clip: how much of a group's range its scale covers: absmax (all of it) or mse (what gives the
        least squared error, weighted by the inputs' squares where there is calibration).
      ranges: how the one scale of all inputs of a static form is found.
      percentile: of |x|, that `ranges` = percentile keeps.
      damp: of GPTQ.
      exponent: of SmoothQuant.
    """

    method: str = "rtn"
    clip: str = "absmax"
    ranges: str = "absmax"
    percentile: float = 99.99
    damp: float = 0.01
    exponent: float = 0.5

    def __post_init__(self) -> None:
        for name, right in (("method", METHODS), ("clip", CLIPS), ("ranges", RANGES)):
            value = getattr(self, name)
            if value not in right:
                raise ValueError(f"--{name}={value}: choose one of {', '.join(right)}")
        if not 0 < self.percentile <= 100:
            raise ValueError(f"--percentile={self.percentile}: above 0, at most 100")
        if not 0 < self.damp < 1:
            raise ValueError(f"--damp={self.damp}: a part of the mean, between 0 and 1")
        if not 0 <= self.exponent <= 1:
            raise ValueError(f"--exponent={self.exponent}: between 0 and 1")
        refuse_idle(self, "damp", "method", "gptq")
        refuse_idle(self, "exponent", "method", "smoothquant")
        refuse_idle(self, "percentile", "ranges", "percentile")
        if self.ranges != "absmax" and self.method in ("awq", "smoothquant"):
            raise ValueError(
                f"--ranges={self.ranges}: is found of the inputs as they are, and {self.method} "
                f"scales each channel of them; leave it at absmax"
            )

    def check(self, forms: Iterable[Form], flag: str) -> None:
        """Refuses forms that this does not make.

        Args:
          flag: what gave them, for messages.

        Raises:
          ValueError: saying what does.
        """
        every = set(forms)
        for form in every:
            other = {
                "2:4": "python -m compress prune --pattern=2:4 --packed",
                "rank": f"python -m compress factorize --rank={form.rank}",
            }.get(form.kind)
            if other:
                raise ValueError(f"{flag}: {written(form)} is no form of codes; {other} makes it")
        if all(form.code is None for form in every):
            raise ValueError(f"{flag}: nothing is rounded; give a form such as int4:128")
        if self.ranges != "absmax" and not any(form.static for form in every):
            raise ValueError(
                f"--ranges={self.ranges}: has no effect with {flag}; it is of inputs with one "
                f"scale, as in --form=int8+int8="
            )

    @property
    def calibrated(self) -> bool:
        """Whether the method itself reads text."""
        return self.method != "rtn"


def quantize(
    how: Quantize,
    forms: Mapping[str, Sequence[Form]],
    config: ModelConfig,
    model: Model,
    params: Tree,
    text: Calibration | None,
    *,
    scratch: Path | None = None,
) -> Result:
    """The model's weights in codes.

    Args:
      forms: name of a matrix -> form of each of its layers.
      config: of the model.
      model: dense; call it under its mesh.
      params: master parameters; they stay.
      text: None where nothing is calibrated.
      scratch: an empty folder for layers that are done (`Result`).

    Raises:
      ValueError: a model whose layers cannot be walked.
    """
    result = Result(model, params, scratch)
    if text is not None:
        what = f"--method={how.method}" if how.calibrated else "one scale for all inputs (=)"
        check_walk(model, what, forms)

        def visit(layer: Layer) -> dict[str, np.ndarray]:
            return _visit(how, forms, config, result, layer)

        walk(text, params, visit)
        return result
    for name, array in named(params).items():
        if name not in forms:
            continue
        stacked = is_stacked(result.axes[name])
        for layer in range(result.layers(name)):
            one = np.asarray(jax.reshard(array[layer] if stacked else array, jax.P()), np.float32)
            form = forms[name][layer]
            if form.code is not None:
                result.put(name, layer, _rounded(how, form, result, name, one, None)[0], form)
            else:
                result.put(name, layer, one)
    return result


def _visit(
    how: Quantize,
    forms: Mapping[str, Sequence[Form]],
    config: ModelConfig,
    result: Result,
    layer: Layer,
) -> dict[str, np.ndarray]:
    """One layer in codes; its arrays as they are run with."""
    arrays, inputs = dict(layer.weights), dict(layer.inputs)
    changed: dict[str, np.ndarray] = {}
    mine = {name: own[layer.number] for name, own in forms.items() if name in arrays}
    if how.method in ("awq", "smoothquant"):
        changed = _folded(how, mine, config, result, arrays, inputs)
        arrays |= changed
    for name in inputs:  # a matrix that keeps its form may be the source of a fold
        if name not in mine or mine[name].code is None:
            continue
        node, values = _rounded(how, mine[name], result, name, arrays[name], inputs[name])
        result.put(name, layer.number, node, mine[name])
        changed[name] = values
    for name, array in changed.items():
        if name not in mine or mine[name].code is None:
            result.put(name, layer.number, array)
    return changed


def _folded(
    how: Quantize,
    forms: Mapping[str, Form],
    config: ModelConfig,
    result: Result,
    arrays: dict[str, np.ndarray],
    inputs: dict[str, Inputs],
) -> dict[str, np.ndarray]:
    """The arrays that scales of inputs change; `inputs` become those of the scaled matrices."""
    changed: dict[str, np.ndarray] = {}
    matrices = {name: result.matrix(name) for name in inputs}
    for fold in folds_of(config, list(arrays), STACK):
        targets = [name for name in fold.targets if name in forms]
        codes = [code for name in targets if (code := forms[name].code) is not None]
        if not targets or len(codes) < len(targets):
            continue
        now = arrays | changed
        flat = [now[n].reshape(matrices[n].rows, matrices[n].columns) for n in targets]
        shared = lambda scale, fold=fold: shared_scale(fold, scale, config.head_dim)
        if how.method == "awq":
            scale = awq_scale(codes, flat, inputs[targets[0]], shared)
        else:
            scale = shared(smooth_scale(flat, inputs[targets[0]], how.exponent))
        changed |= apply_fold(fold, now, matrices, scale.astype(np.float32), config.head_dim)
        for name in fold.targets:
            inputs[name] = scaled_inputs(inputs[name], scale)
    return changed


def _rounded(
    how: Quantize, form: Form, result: Result, name: str, array: np.ndarray, inputs: Inputs | None
) -> tuple[Any, np.ndarray]:
    """(the node of one layer's matrix, float32 array of what it stands for)."""
    matrix, code = result.matrix(name), form.code
    assert code is not None
    found = []
    for w in array.reshape(-1, matrix.rows, matrix.columns):  # one, or each expert's
        clip: np.ndarray | float = 1.0
        if how.clip == "mse":
            clip = best_clip(code, w, None if inputs is None else np.diag(inputs.moment))
        if how.method == "gptq" and inputs is not None:
            codes, scales = gptq(code, w, inputs.moment, damp=how.damp, clip=clip)
        else:
            _, codes, scales = nearest(code, w, clip)
        found.append((codes, scales))
    codes, scales = (
        np.stack(part).reshape(*matrix.lead, *part[0].shape) for part in zip(*found, strict=True)
    )
    limit = None
    if form.static:
        assert inputs is not None
        limit = jnp.asarray([limit_of(inputs, form.inputs, how.ranges, how.percentile)])
    node = _node(
        jnp.asarray(array),
        jnp.asarray(scales),
        jnp.asarray(codes),
        limit,
        code=code,
        matrix=matrix,
        inputs=form.inputs,
    )
    if code.kind == "nf4":  # its scales are codes, too
        return node, np.asarray(dense_layer(node))
    rows = np.repeat(scales, matrix.rows // scales.shape[-2], axis=-2)
    return node, host.decode(code, codes, rows).reshape(array.shape)


@partial(jax.jit, static_argnames=("code", "matrix", "inputs"))
def _node(
    w: jax.Array, scales: jax.Array, codes: jax.Array, limit: Any, **static: Any
) -> Quantised:
    code, matrix, inputs = static["code"], static["matrix"], static["inputs"]
    return quantised(code, matrix, w, scales, codes=codes, inputs=inputs, limit=limit)
