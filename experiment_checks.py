"""What sections of a config may not be together: `experiment.read_experiment`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from models.config import ModelConfig
from models.part_costs import part_costs
from models.weights import model_weights
from parallel.pipeline import PipelineConfig
from training.low_rank import smaller_side
from training.matrices import orthogonalises
from training.optim import SCALES

if TYPE_CHECKING:
    from experiment import Experiment


def check_images(length: int, model: ModelConfig) -> None:
    """Refuses rows whose images have no place in them.

    Raises:
      ValueError: naming the key, its value and what would be right.
    """
    patches, longest = model.vision.patches, model.max_length
    if model.family == "vision" and length != patches:
        raise ValueError(
            f"config.data.sequence_length = {length}: rows of config.model.family = 'vision' are "
            f"the {patches} patches of an image; set it to {patches}"
        )
    if length + model.image_tokens > longest:
        raise ValueError(
            f"config.data.sequence_length = {length} and the {patches} patches of an image before "
            f"it are more than config.model.max_length = {longest}; raise max_length"
        )


def check_adapter(experiment: Experiment) -> None:
    """Refuses what adapters do not go with.

    Raises:
      ValueError: naming the key, its value and what would be right.
    """
    method = experiment.adapter.method
    if not method:
        return
    if experiment.staged:
        raise ValueError(
            f"config.adapter.method = {method!r}: not built for training with config.mesh.pipe = "
            f"{experiment.mesh.pipe}; set the pipe axis to 1, and fsdp or tensor higher"
        )
    if experiment.training and experiment.distill.teacher:
        raise ValueError(
            f"config.distill.teacher = '{experiment.distill.teacher}': not built for "
            f"config.adapter.method = {method!r}; leave one of them out"
        )
    if experiment.init_from:
        raise ValueError(
            f"config.init_from = '{experiment.init_from}': adapters begin from config.adapter.base "
            f"= '{experiment.adapter.base}'; leave it out"
        )
    if experiment.optimizer.frozen:
        raise ValueError(
            f"config.optimizer.frozen = {list(experiment.optimizer.frozen)}: with "
            f"config.adapter.method = {method!r} all but the adapters is frozen; leave it out"
        )


def check_pipeline(experiment: Experiment) -> None:
    """Refuses stages that the schedule, the layers or other sections do not allow.

    Raises:
      ValueError: naming the key, its value and what would be right.
    """
    accumulation = experiment.train.grad_accumulation
    if accumulation != 1:
        raise ValueError(
            f"config.train.grad_accumulation = {accumulation}: with config.mesh.pipe = "
            f"{experiment.mesh.pipe} config.pipeline.microbatches divides a batch; set it to 1"
        )
    if experiment.optimizer.offload:  # it loops over layers, which are divided over stages
        raise ValueError(
            f"config.optimizer.offload = True: not built for config.mesh.pipe = "
            f"{experiment.mesh.pipe}; set it to False, or the pipe axis to 1"
        )
    if experiment.weights.forms:  # stages sum gradients of all that they hold, codes too
        raise ValueError(
            f"config.weights.forms: not built for training with config.mesh.pipe = "
            f"{experiment.mesh.pipe}; set the pipe axis to 1, and fsdp or tensor higher"
        )
    if experiment.remat.offload:  # rings are on the device
        raise ValueError(
            f"config.remat.offload = {list(experiment.remat.offload)}: not built for "
            f"config.mesh.pipe = {experiment.mesh.pipe}; name them in config.remat.save, or set "
            f"the pipe axis to 1"
        )


def check_optimizer(experiment: Experiment) -> None:
    """Refuses an optimizer that these parameters have no use for.

    Raises:
      ValueError: naming the key, its value and what would be right.
    """
    optimizer, params = experiment.optimizer, experiment.precision.params
    if optimizer.stochastic_rounding and params != "bfloat16":
        raise ValueError(
            f"config.optimizer.stochastic_rounding = True: parameters in {params} are rounded to "
            f"the nearest; set config.precision.params to 'bfloat16', or this to False"
        )
    if optimizer.name not in SCALES:
        return
    block, outside = model_weights(experiment.model)
    sides = [smaller_side(w.axes, w.shape) for w in (*block, *outside) if orthogonalises(w.axes)]
    if max(sides, default=0) <= optimizer.rank:
        raise ValueError(
            f"config.optimizer.rank = {optimizer.rank}: no matrix is larger, the largest smaller "
            f"side of one is {max(sides, default=0)}; choose a rank below it, or "
            f"config.optimizer.name = 'adamw'"
        )


def divided(experiment: Experiment) -> PipelineConfig:
    """The pipeline with the layers of every chunk.

    Raises:
      ValueError: of `PipelineConfig.division`.
    """
    model, pipeline = experiment.model, experiment.pipeline
    costs = part_costs(
        model, experiment.data.sequence_length, experiment.remat, experiment.source_length
    )
    schedule = pipeline.table(experiment.mesh.pipe)
    division = pipeline.division(schedule, model.layers, len(model.pattern), costs)
    return replace(pipeline, layers=division.layers)
