"""Which layer gets which form, so that the outputs change least within a number of bits.

Each matrix of each layer is tried in every form, on the inputs of the dense model; what a form
costs is the change of the matrix's outputs as a part of what they are. From the smallest forms on,
the change that buys the most for each bit comes first, until the budget is spent: the greedy way on
the lower convex hull, which is optimal for it (Shoham and Gersho 1988,
https://doi.org/10.1109/29.90373).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress.calibration import Calibration
from compress.gptq import output_error
from compress.result import Result
from compress.walk import Layer, check_walk, walk
from parallel.forms import Form
from training.state import Model
from training.stored import dense_layer


@dataclass(frozen=True)
class Option:
    """A form that a layer's matrix may have.

    Attributes:
      bits: of all its arrays.
      weights: numbers of the matrix.
      cost: the part of the outputs' squares that it changes.
    """

    form: Form
    bits: int
    weights: int
    cost: float


Candidates = dict[str, list[list[Option]]]  # of each matrix and layer


def candidates(
    model: Model,
    params: Any,
    text: Calibration,
    options: Sequence[Mapping[str, Sequence[Form]]],
) -> Candidates:
    """What every form would cost, by one walk through the dense model.

    Args:
      options: forms to choose from, by matrix and layer; where a matrix has none it stays an array.
    """
    names = {name for forms in options for name in forms}
    check_walk(model, "--mix", names)
    result = Result(model, params)
    found: Candidates = {name: [[] for _ in range(result.layers(name))] for name in sorted(names)}

    def visit(layer: Layer) -> dict[str, jax.Array]:
        for name, inputs in layer.inputs.items():
            if name not in found:
                continue
            matrix = result.matrix(name)
            w = np.asarray(layer.weights[name], np.float32).reshape(matrix.rows, matrix.columns)
            whole = output_error(inputs.moment, w)
            for forms in options:
                form = forms[name][layer.number] if name in forms else Form("none")
                node: Any = form.store(matrix, jnp.asarray(w))
                near = np.asarray(dense_layer(node) if form.code else node).reshape(w.shape)
                bits = 8 * sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(node))
                cost = output_error(inputs.moment, near - w) / max(whole, 1e-30)
                found[name][layer.number].append(Option(form, bits, w.size, cost))
        return {}

    walk(text, params, visit)
    return found


def mixed(found: Candidates, bits: float, flag: str = "bits") -> dict[str, list[Form]]:
    """The form of every layer, at most `bits` a weight in all.

    Args:
      flag: of the command line, "bits" or "keep" (a part of 32 bits), for the message.

    Raises:
      ValueError: even the smallest forms have more.
    """
    places = [(name, i) for name, layers in found.items() for i in range(len(layers))]
    hulls = [_hull(found[name][i]) for name, i in places]
    weights = sum(found[name][i][0].weights for name, i in places)
    spent, taken = sum(hull[0].bits for hull in hulls), [0] * len(hulls)
    if spent > bits * weights:
        unit = 32 if flag == "keep" else 1
        raise ValueError(
            f"--{flag}={bits / unit:g}: the smallest forms make {spent / weights / unit:.3f}; give "
            f"at least that"
        )
    steps = [
        (_slope(a, b), place, step)
        for place, hull in enumerate(hulls)
        for step, (a, b) in enumerate(pairwise(hull))
    ]
    # Of one place they come in order: a hull is convex.
    for _, place, step in sorted(steps, key=lambda s: (-s[0], *s[1:])):
        hull = hulls[place]
        more = hull[step + 1].bits - hull[step].bits
        if taken[place] == step and spent + more <= bits * weights:
            taken[place], spent = step + 1, spent + more
    forms: dict[str, list[Form]] = {}
    for (name, _), hull, index in zip(places, hulls, taken, strict=True):
        forms.setdefault(name, []).append(hull[index].form)
    return forms


def _hull(options: Sequence[Option]) -> list[Option]:
    """Those that cost less for more bits, ever less for each bit."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bits, o.cost)):
        if hull and option.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], option) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    return (a.cost - b.cost) / (b.bits - a.bits)
