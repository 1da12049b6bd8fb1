"""Training with weights that are rounded where they are used, by `config.quantize`.

Master weights, moments and checkpoints are those of any run: the codes are made in every step anew,
and in evaluation (`parallel/rounded.py`). What the run is for is a checkpoint that loses little
when `python -m compress` rounds it in the same form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import jax

from parallel.forms import Form, Forms, written
from parallel.rounded import Rounded
from parallel.stored import Matrix, is_stored
from parallel.twin import Twin
from training.naming import named
from training.state import Model, drawn_shapes
from training.stored import WeightsConfig, chosen_forms

Tree = Any


@dataclass(frozen=True)
class QuantizeConfig(WeightsConfig):
    """Rounding in training (`config.quantize`).

    Attributes:
      forms: pattern of canonical names -> form of codes, such as {"stack/*": "int4:32"}; int8+int8
        and fp8+fp8 multiply codes with codes.
    """

    def key(self, pattern: str) -> str:
        """The config key of a pattern."""
        return f"config.quantize.forms[{pattern!r}]"

    def without_effect(self, backend: str) -> list[str]:
        """What saves no time on a backend, a sentence each."""
        if backend != "cpu" or "fp8+fp8" not in self.forms.values():
            return []
        why = "XLA:CPU multiplies float8 no faster than float32"
        return [f"config.quantize.forms: 'fp8+fp8' saves no time: {why}"]


def rounded(model: Model, config: QuantizeConfig) -> Model:
    """The model with the weights rounded where they are used, as the config says.

    Raises:
      ValueError: a pattern that names no matrix, a form that is not of codes or that the matrix
        cannot have, or a weight that `config.weights` stores in another form already.
    """
    if not config.forms:
        return model
    places = _places(model, config)

    def wrapped(function: Callable[..., Any] | None) -> Any:
        if function is None:
            return None
        return lambda params, *args: function(_with_nodes(params, places), *args)

    cut = model.cut
    if cut is not None:
        parts = {part: wrapped(getattr(cut, part)) for part in ("embed", "blocks", "loss")}
        cut = replace(cut, **parts)
    return replace(
        model,
        loss=wrapped(model.loss),
        scores=wrapped(model.scores),
        features=wrapped(model.features),
        cut=cut,
    )


@dataclass(frozen=True)
class _Place:
    """How one weight is rounded."""

    form: Form
    matrix: Matrix

    def node(self, weight: Any) -> Any:
        """The weight as the model takes it; what is a node already stays."""
        if weight is None or is_stored(weight):
            return weight
        assert self.form.code is not None
        return Rounded(weight, self.form.code, self.matrix, self.form.inputs)


def _places(model: Model, config: QuantizeConfig) -> dict[str, _Place]:
    """Every weight that is rounded, by canonical name."""
    axes, shapes = named(model.axes), named(drawn_shapes(model))
    for path, node in jax.tree_util.tree_leaves_with_path(model.axes, is_leaf=is_stored):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        patterns = [p for p in config.forms if fnmatchcase(name, p)]
        if is_stored(node) and patterns:
            raise ValueError(
                f"{config.key(patterns[0])}: {name} is no array that is trained "
                f"(config.weights.forms, config.adapter); name others"
            )
    found = {}
    for name, forms in chosen_forms(config, {n: a.shape for n, a in shapes.items()}, axes).items():
        matrix = Matrix.of(shapes[name].shape, axes[name])
        _check(forms, matrix, f"config.quantize.forms: {name}")
        found[name] = _Place(forms.rest, matrix)
    return found


def _check(forms: Forms, matrix: Matrix, where: str) -> None:
    """Refuses a form that training does not round to.

    Raises:
      ValueError: saying which would do.
    """
    form = forms.rest
    if forms.layers:
        raise ValueError(f"{where}: forms by layer (@) are of weights at rest; give all layers one")
    if form.code is None:
        raise ValueError(
            f"{where}: {written(form)!r} is no form of codes; choose int8, int4:32, nf4:64, fp8, "
            f"int8+int8 or fp8+fp8"
        )
    if form.static:
        raise ValueError(
            f"{where}: {written(form)!r} has a scale of inputs from calibration; choose "
            f"{written(replace(form, static=False))}"
        )


def _with_nodes(params: Tree, places: Mapping[str, _Place]) -> Tree:
    def node(path: Any, weight: Any) -> Any:
        place = places.get(jax.tree_util.keystr(path, simple=True, separator="/"))
        return weight if place is None else place.node(weight)

    return jax.tree_util.tree_map_with_path(node, params, is_leaf=_one_weight)


def _one_weight(node: Any) -> bool:
    return node is None or is_stored(node) or isinstance(node, Twin)
