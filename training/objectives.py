"""From a config to the model that a step trains: what each family may be trained for."""

from __future__ import annotations

from data.objective import ObjectiveConfig
from models.config import ModelConfig
from parallel.pipeline import PipelineConfig
from parallel.remat import RematConfig
from parallel.rules import Rules
from training.captioning import captioning
from training.causal_lm import causal_lm
from training.encoder_model import encoder_model
from training.image_classification import image_classification
from training.losses import LossConfig
from training.seq2seq import seq2seq
from training.state import Model

OBJECTIVES = {
    "decoder": ("causal_lm", "prefix_lm"),
    "encoder": ("masked_lm", "classification"),
    "encoder_decoder": ("seq2seq", "span_corruption"),
    "vision": ("classification",),
    "vision_language": ("captioning",),
}
WITH_TASKS = ("encoder", "vision")  # families that have heads for tasks


def make_model(
    config: ModelConfig,
    objective: ObjectiveConfig,
    loss: LossConfig,
    rules: Rules,
    remat: RematConfig,
    pipeline: PipelineConfig | None = None,
) -> Model:
    """The model of a config as pure functions; call it inside `jax.set_mesh`."""
    check_objective(config, objective)
    if config.family == "encoder":
        return encoder_model(config, loss, objective.task_weight, rules, remat, pipeline)
    if config.family == "encoder_decoder":
        return seq2seq(config, loss, rules, remat, pipeline)
    if config.family == "vision":
        return image_classification(config, rules, remat, pipeline)
    if config.family == "vision_language":
        return captioning(config, loss, rules, remat, pipeline)
    return causal_lm(config, loss, rules, remat, pipeline)


def check_objective(config: ModelConfig, objective: ObjectiveConfig) -> None:
    """Refuses what a family is not trained for.

    Raises:
      ValueError: naming the key, its value and what would be right.
    """
    possible = OBJECTIVES[config.family]
    if objective.name not in possible:
        raise ValueError(
            f"config.objective.name = {objective.name!r}: config.model.family = "
            f"{config.family!r} is trained for {' or '.join(possible)}"
        )
    if config.tasks and config.family not in WITH_TASKS:
        raise ValueError(
            f"config.objective.tasks = {dict(config.tasks)}: config.model.family = "
            f"{config.family!r} has no heads for them; leave it empty"
        )
    assert config.token_head == (objective.name != "classification"), (config, objective)
    assert config.token_head or config.tasks, config
