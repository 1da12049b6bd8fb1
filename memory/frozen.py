"""Which weights a run does not train, for the planner: as layers declare them."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType

from data.objective import ObjectiveConfig
from models.config import ModelConfig
from parallel.footprint import Weight
from parallel.mesh import AXES, MeshConfig
from parallel.precision import PrecisionConfig
from parallel.remat import RematConfig
from parallel.rules import ParallelConfig, make_rules
from training.frozen import matching
from training.losses import LossConfig
from training.naming import named
from training.objectives import make_model
from training.state import abstract_params

# How names begin of what reads the last layer alone, and of an encoder beside a decoder.
BEHIND = {
    "decoder": ("final_norm", "head"),
    "encoder": ("final_norm", "head", "pooler"),
    "encoder_decoder": ("final_norm", "head"),
    "vision": ("vision/final_norm", "heads"),
    "vision_language": ("final_norm", "head"),
}
BESIDE = {"encoder_decoder": "encoder/", "vision_language": "images/vit/"}


class Frozen(NamedTuple):
    """The frozen weights, and whether no gradient is propagated for that through the layers, and
    through those of an encoder beside them.
    """

    weights: tuple[Weight, ...] = ()
    below: bool = False
    beside: bool = False


@lru_cache(maxsize=256)
def frozen_weights(
    model: ModelConfig, objective: ObjectiveConfig, patterns: tuple[str, ...]
) -> Frozen:
    """What `config.optimizer.frozen` names: names are those of the traced model, traced once.

    Raises:
      ValueError: of `training.frozen.matching`.
    """
    if not patterns:
        return Frozen()
    rules = make_rules(ParallelConfig(zero=0), MeshConfig(data=1).sizes(), {})
    mesh = AbstractMesh((1,) * len(AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    with jax.sharding.use_abstract_mesh(mesh):
        made = make_model(model, objective, LossConfig(), rules, RematConfig())
        shapes = named(abstract_params(made, PrecisionConfig()))
    axes = named(made.axes)
    names = matching(patterns, axes)
    weights = tuple(Weight(tuple(shapes[name].shape), axes[name]) for name in sorted(names))
    trained = [name for name in axes if name not in names]
    behind = all(name.startswith(BEHIND[model.family]) for name in trained)
    return Frozen(weights, behind, _frozen_beside(model, trained))


def _frozen_beside(model: ModelConfig, trained: list[str]) -> bool:
    """Whether nothing before the last layer of the encoder beside is trained."""
    root = BESIDE.get(model.family)
    if root is None:
        return False
    tables = ("embedding", "embedding_projection") if model.family == "encoder_decoder" else ()
    own = [name for name in trained if name.startswith(root) or name in tables * model.source_tied]
    return all(name.startswith(f"{root}final_norm") for name in own)
