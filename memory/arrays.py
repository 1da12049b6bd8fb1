"""The arrays that a model has at rest, in whatever form its weights are and whatever is on them.

Those of plain weights are what layers declare. Where some are stored in other forms
(`config.weights`), adapted (`config.adapter`) or frozen (`config.optimizer.frozen`), the model
itself says what there is: it is traced once, on one device, for names, shapes and dtypes. Of
packed weights the layout decides the logical axes, too; they are asked for again.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType

from data.objective import ObjectiveConfig
from memory.job import Job, kept_model
from models.config import ModelConfig
from models.weights import model_weights
from parallel.adapted import base_name
from parallel.footprint import Weight
from parallel.forms import Forms
from parallel.mesh import AXES, MeshConfig
from parallel.precision import PrecisionConfig
from parallel.remat import RematConfig
from parallel.rules import ParallelConfig, Rules, make_rules, of_one_layer
from parallel.stored import cast
from training.adapters import AdapterConfig
from training.losses import LossConfig
from training.naming import named
from training.objectives import make_model
from training.rounded import QuantizeConfig
from training.state import abstract_params, drawn_shapes
from training.stored import WeightsConfig, chosen_forms

# How names begin of what reads the last layer alone, and of an encoder beside a decoder.
BEHIND = {
    "decoder": ("final_norm", "head"),
    "encoder": ("final_norm", "head", "pooler"),
    "encoder_decoder": ("final_norm", "head"),
    "vision": ("vision/final_norm", "heads"),
    "vision_language": ("final_norm", "head"),
}
PACKED = ("codes", "2:4")  # kinds of forms that are made dense
BESIDE = {"encoder_decoder": "encoder/", "vision_language": "images/vit/"}


class Array(NamedTuple):
    """One array.

    Attributes:
      weight: its shape and logical axes.
      dtype: at rest.
      used: dtype in which the model takes it; codes and scales are taken as they are.
      trained: whether it has a gradient and moments.
      name: canonical, or "" where all are trained.
    """

    weight: Weight
    dtype: str
    used: str
    trained: bool = True
    name: str = ""


class Arrays(NamedTuple):
    """All arrays of a model.

    Attributes:
      stacked: of all blocks, stacked.
      outside: what stands outside the stack.
      made: of one layer, the weights that are made where they are used: dense ones of packed
        codes, rounded ones in training with `config.quantize`.
      below: no gradient is propagated through the layers, as nothing below them is trained.
      beside: the same of an encoder beside them.
    """

    stacked: tuple[Array, ...]
    outside: tuple[Array, ...]
    made: tuple[Weight, ...] = ()
    below: bool = False
    beside: bool = False


class _Traced(NamedTuple):
    """What does not depend on the layout.

    Attributes:
      arrays: canonical name -> array.
      stored: name of a weight in another form than an array -> (its forms, the weight).
      made: see `Arrays`, stacked and of all stacks.
    """

    arrays: dict[str, Array]
    stored: dict[str, tuple[Forms, Weight]]
    made: tuple[Weight, ...]
    below: bool
    beside: bool


def arrays_of(job: Job) -> Arrays:
    """The arrays of a job's model under its rules.

    Raises:
      ValueError: a pattern of the config that names no weight, or a weight that cannot be as the
        config has it.
    """
    precision = job.precision
    plain = lambda weight: Array(weight, precision.params, precision.compute)
    own = tuple(map(plain, job.projection))
    forms, rounded = (tuple(c.forms.items()) for c in (job.weights, job.quantize))
    patterns, dtypes = job.optimizer.frozen, (precision.params, precision.compute)
    if not (forms or rounded or job.adapter.method or patterns):
        block, outside = model_weights(job.model)
        stacked = [weight.stacked(job.model.blocks, job.model.stack) for weight in block]
        return Arrays(tuple(map(plain, stacked)), (*map(plain, outside), *own))
    traced = _traced(job.model, job.objective, forms, rounded, job.adapter, patterns, dtypes)
    axes = _stored_axes(traced, job.rules)
    found = [
        array._replace(weight=array.weight._replace(axes=axes.get(base_name(n), array.weight.axes)))
        for n, array in traced.arrays.items()
    ]
    inside = lambda weight: weight.axes.split()[0] == job.model.stack
    return Arrays(
        tuple(array for array in found if inside(array.weight)),
        (*[array for array in found if not inside(array.weight)], *own),
        tuple(Weight(w.shape[1:], of_one_layer(w.axes)) for w in traced.made if inside(w)),
        traced.below,
        traced.beside,
    )


@lru_cache(maxsize=256)
def _traced(
    model: ModelConfig,
    objective: ObjectiveConfig,
    forms: tuple[tuple[str, str], ...],
    rounded: tuple[tuple[str, str], ...],
    adapter: AdapterConfig,
    patterns: tuple[str, ...],
    dtypes: tuple[str, str],
) -> _Traced:
    rules = make_rules(ParallelConfig(zero=0), MeshConfig(data=1).sizes(), {})
    mesh = AbstractMesh((1,) * len(AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    weights = WeightsConfig(dict(forms))
    with jax.sharding.use_abstract_mesh(mesh):
        dense = make_model(model, objective, LossConfig(), rules, RematConfig())
        plain, plain_axes = named(drawn_shapes(dense)), named(dense.axes)
        made = kept_model(dense, weights, adapter, patterns)
        rest = abstract_params(made, PrecisionConfig(params=dtypes[0], compute=dtypes[1]))
        used = named(jax.eval_shape(lambda params: cast(params, dtypes[1]), rest))
    shapes = {name: tuple(array.shape) for name, array in plain.items()}
    chosen = chosen_forms(weights, shapes, plain_axes)
    packed = [n for n, of in chosen.items() if any(f.kind in PACKED for f in of.all)]
    again = chosen_forms(QuantizeConfig(dict(rounded)), shapes, plain_axes)
    weight_of = lambda name: Weight(shapes[name], plain_axes[name])
    axes, trained = named(made.axes), [n for n in named(made.axes) if n not in made.frozen]
    arrays = {
        name: Array(
            Weight(tuple(array.shape), axes[name]),
            str(array.dtype),
            str(used[name].dtype),
            name not in made.frozen,
            name,
        )
        for name, array in named(rest).items()
    }
    return _Traced(
        arrays,
        {name: (forms_of, weight_of(name)) for name, forms_of in chosen.items()},
        tuple(map(weight_of, [*packed, *again])),
        all(name.startswith(BEHIND[model.family]) for name in trained),
        _frozen_beside(model, trained),
    )


def _stored_axes(traced: _Traced, rules: Rules) -> dict[str, str]:
    """The logical axes under a layout of the arrays of weights in other forms, by their names in
    the model without adapters.
    """
    return {
        f"{name}/{array}": axes
        for name, (forms, weight) in traced.stored.items()
        for array, axes in named(forms.axes(weight.shape, weight.axes, rules)).items()
    }


def _frozen_beside(model: ModelConfig, trained: list[str]) -> bool:
    """Whether nothing before the last layer of the encoder beside is trained."""
    root = BESIDE.get(model.family)
    if root is None:
        return False
    tables = ("embedding", "embedding_projection") if model.family == "encoder_decoder" else ()
    own = [name for name in trained if name.startswith(root) or name in tables * model.source_tied]
    return all(name.startswith(f"{root}final_norm") for name in own)
