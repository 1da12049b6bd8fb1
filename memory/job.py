"""What the planner needs of an experiment: its typed sections and the layout they give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax

from data.objective import ObjectiveConfig
from models.beside import beside_length, encoder_beside
from models.config import ModelConfig
from models.flops import attention_flops_per_token, flops_per_token
from models.part_costs import part_costs
from parallel.footprint import Weight
from parallel.mesh import PIPE, MeshConfig
from parallel.pipeline import PipelineConfig
from parallel.precision import PrecisionConfig
from parallel.remat import RematConfig
from parallel.rules import ParallelConfig, Rules
from training.adapters import AdapterConfig, adapted
from training.batch_arrays import BatchArray, batch_arrays
from training.distill import (
    Distillation,
    DistillConfig,
    Pair,
    projection_weights,
    with_projection,
)
from training.frozen import freeze
from training.losses import LossConfig
from training.objectives import make_model
from training.optim import Optimizer, OptimizerConfig, make_optimizer
from training.rounded import QuantizeConfig, rounded
from training.schedules import make_schedule
from training.sparsity import SparsityConfig, make_sparsity
from training.state import Model, placed_params
from training.step import Step, make_step
from training.stored import WeightsConfig, stored

NO_TEACHER = DistillConfig()
NO_PRUNING = SparsityConfig()
NOT_ROUNDED = QuantizeConfig()
ARRAYS = WeightsConfig()
NOT_ADAPTED = AdapterConfig()


@dataclass(frozen=True)
class Job:
    """One training step of one config on one mesh; `mesh` is resolved.

    Attributes:
      batch_size: sequences of a step over all devices.
      sequence_length: tokens of each.
      source_length: of what its layers attend to besides: a source's, or patches of an image.
      micro_steps: parts that a step's batch is divided into.
      steps: of the run, for the schedule.
      rules: the layout.
      teacher: what the student learns from, as a job of the same micro-steps.
      quantize: what is rounded where it is used.
      weights: in what form they are at rest.
      adapter: what is trained on them, if they are frozen.
    """

    model: ModelConfig
    mesh: MeshConfig
    parallel: ParallelConfig
    precision: PrecisionConfig
    remat: RematConfig
    optimizer: OptimizerConfig
    objective: ObjectiveConfig
    loss: LossConfig
    batch_size: int
    sequence_length: int
    micro_steps: int
    steps: int
    rules: Rules
    pipeline: PipelineConfig | None = None
    source_length: int = 0
    sparsity: SparsityConfig = NO_PRUNING
    distill: DistillConfig = NO_TEACHER
    teacher: Job | None = None
    quantize: QuantizeConfig = NOT_ROUNDED
    weights: WeightsConfig = ARRAYS
    adapter: AdapterConfig = NOT_ADAPTED

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> its size."""
        return self.mesh.sizes()

    @property
    def batch_arrays(self) -> dict[str, BatchArray]:
        """The arrays of a batch."""
        return batch_arrays(self.model, self.objective, self.sequence_length, self.source_length)

    @property
    def encoder(self) -> Job | None:
        """The encoder beside a decoder as a step of its own, if the model has one."""
        model = encoder_beside(self.model)
        if model is None:
            return None
        # Names of frozen and of rounded parameters are the whole model's.
        optimizer = replace(self.optimizer, frozen=())
        length = beside_length(self.model, self.source_length)
        return replace(
            self,
            model=model,
            optimizer=optimizer,
            sequence_length=length,
            source_length=0,
            pipeline=None,
            quantize=NOT_ROUNDED,
            weights=ARRAYS,
            adapter=NOT_ADAPTED,
        )

    @property
    def rows(self) -> int:
        """Sequences of one micro-step on one device."""
        return self.batch_size // self.micro_steps // self.rules.parts("batch")

    @property
    def tokens(self) -> int:
        """Tokens of one micro-step on one device, without those of images."""
        return self.rows * self.sequence_length

    @property
    def stream_length(self) -> int:
        """Tokens of a row of the residual stream: images stand before the text."""
        return self.sequence_length + self.model.image_tokens

    @property
    def flops_per_token(self) -> float:
        """Of the model, forward and backward."""
        return flops_per_token(self.model, self.sequence_length, self.source_length)

    @property
    def attention_flops_per_token(self) -> float:
        """Of scores and weighted sums in its layers."""
        return attention_flops_per_token(self.model, self.sequence_length, self.source_length)

    def with_pipeline(self, pipeline: PipelineConfig) -> Job:
        """The same step by another schedule, its layers divided by it.

        Raises:
          ValueError: the schedule is none for these stages, or the layers none for its chunks.
        """
        stages, model = self.sizes[PIPE], self.model
        # Only the chunks' places count, which a shipped schedule's smallest table has, in any form.
        shortest = pipeline if pipeline.orders else replace(pipeline, microbatches=stages, form="")
        layers, in_rows = _divided(
            shortest, stages, model, (self.sequence_length, self.source_length), self.remat
        )
        rules = replace(self.rules, rows=in_rows)
        return replace(
            self,
            pipeline=replace(pipeline, layers=layers),
            micro_steps=pipeline.microbatches,
            rules=rules,
        )

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Layers that are matched with the teacher's."""
        teacher = self.teacher
        return (
            () if teacher is None else self.distill.pairs(self.model.layers, teacher.model.layers)
        )

    @property
    def projection(self) -> list[Weight]:
        """The weight that only training with a teacher of another width has."""
        if self.teacher is None:
            return []
        return projection_weights(self.distill, self.model.embed_dim, self.teacher.model.embed_dim)

    def build_model(self) -> Model:
        """The model as pure functions; call it inside `jax.set_mesh`."""
        model = make_model(
            self.model, self.objective, self.loss, self.rules, self.remat, self.pipeline
        )
        model = kept_model(model, self.weights, self.adapter, self.optimizer.frozen)
        model = rounded(model, self.quantize)
        if self.teacher is None:
            return model
        widths = self.model.embed_dim, self.teacher.model.embed_dim
        return with_projection(model, self.distill, *widths)

    def teacher_params(
        self, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
    ) -> tuple[Any, ...]:
        """What the step takes beside state and batch, as shapes with shardings."""
        teacher = self.teacher
        if teacher is None:
            return ()
        return (placed_params(teacher.build_model(), teacher.precision, mesh),)

    def build(self) -> tuple[Model, Optimizer, Step]:
        """Model, optimizer and step as pure functions; call it inside `jax.set_mesh`."""
        model, teacher, told = self.build_model(), self.teacher, None
        if teacher is not None:
            told = Distillation(
                self.distill,
                model,
                teacher.build_model(),
                teacher.precision.compute,
                self.pairs,
                self.model.vocab_size,
                self.loss,
            )
        sparsity = make_sparsity(self.sparsity, model)
        trained = model.trained(model.axes)
        optimizer = make_optimizer(self.optimizer, self.steps, trained, sparsity.names)
        schedule = make_schedule(self.optimizer, self.steps)
        step = make_step(
            model,
            optimizer,
            schedule,
            self.precision,
            seed=0,
            micro_steps=self.micro_steps,
            stochastic=self.optimizer.stochastic_rounding,
            distillation=told,
            sparsity=sparsity,
        )
        return model, optimizer, step


def kept_model(
    model: Model, weights: WeightsConfig, adapter: AdapterConfig, frozen: tuple[str, ...]
) -> Model:
    """A model with its weights as the config keeps them: stored, adapted and frozen."""
    return freeze(adapted(stored(model, weights), adapter), frozen)


@lru_cache(maxsize=1024)
def _divided(
    pipeline: PipelineConfig,
    stages: int,
    model: ModelConfig,
    lengths: tuple[int, int],
    remat: RematConfig,
) -> tuple[tuple[int, ...], bool]:
    """Layers of each chunk, and whether they lie at rest as stages use them."""
    schedule = pipeline.table(stages)
    costs = part_costs(model, lengths[0], remat, lengths[1])
    division = pipeline.division(schedule, model.layers, len(model.pattern), costs)
    return division.layers, division.in_rows(schedule)
