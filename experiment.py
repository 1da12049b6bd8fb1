"""A config made typed and checked as a whole: what every command line builds first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from config_types import build, fit
from data import agree
from data.config import DataConfig
from data.objective import ObjectiveConfig
from data.parts import ImageShape
from experiment_checks import (
    check_adapter,
    check_images,
    check_optimizer,
    check_pipeline,
    divided,
)
from experiment_teacher import check_teacher, teacher_config
from generation.config import GenerateConfig
from memory.job import Job
from memory.plan import MemoryConfig
from models import config_checks
from models.beside import beside_length
from models.config import ModelConfig
from models.experts_config import ExpertsConfig
from models.vision_config import VisionConfig
from parallel.mesh import MeshConfig
from parallel.pipeline import PipelineConfig
from parallel.precision import PrecisionConfig
from parallel.remat import CROSS_TENSORS, EXPERT_TENSORS, RematConfig
from parallel.rules import ParallelConfig, Rules, make_rules
from training.adapters import AdapterConfig, adapted
from training.checkpoint import CheckpointConfig
from training.distill import Distillation, DistillConfig, with_projection
from training.evaluation import EvalConfig, results
from training.frozen import freeze
from training.losses import LossConfig
from training.metrics import LoggingConfig
from training.objectives import check_objective, make_model
from training.optim import OptimizerConfig
from training.rounded import QuantizeConfig, rounded
from training.sparsity import SparsityConfig
from training.state import Model
from training.stored import WeightsConfig, stored

if TYPE_CHECKING:
    from data.dataset import Data

LAYOUTS = ("given", "auto")


@dataclass(frozen=True)
class TrainConfig:
    """The loop (`config.train`).

    Attributes:
      steps: steps in all; a run that is continued goes on up to it.
      log_every: steps between two rows of metrics.
      grad_accumulation: micro-steps that a step's batch is divided into.
      max_skipped: updates skipped in a row, their gradient not finite, before giving up.
    """

    steps: int
    log_every: int = 10
    grad_accumulation: int = 1
    max_skipped: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "grad_accumulation", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"config.train.{name} = {getattr(self, name)}: at least 1")


@dataclass(frozen=True)
class Experiment:
    """All sections of a config; `mesh` is resolved for the devices, `pipeline.layers` for it."""

    seed: int
    layout: str  # "given", or "auto": chosen by `before_run.py`
    init_from: str  # a checkpoint's or a run's folder to start from, or ""
    init_new: tuple[str, ...]  # patterns of parameters that a run's checkpoint may lack
    init_drop: tuple[str, ...]  # of those in it that are left out
    model: ModelConfig
    weights: WeightsConfig
    quantize: QuantizeConfig
    adapter: AdapterConfig
    mesh: MeshConfig
    parallel: ParallelConfig
    pipeline: PipelineConfig
    precision: PrecisionConfig
    remat: RematConfig
    data: DataConfig
    optimizer: OptimizerConfig
    sparsity: SparsityConfig
    objective: ObjectiveConfig
    loss: LossConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    eval: EvalConfig
    generate: GenerateConfig
    logging: LoggingConfig
    memory: MemoryConfig
    distill: DistillConfig
    training: bool = True  # or evaluation alone, which has no schedule and no micro-batches
    pipeline_notes: tuple[str, ...] = ()  # of `pipeline.without_effect`, as it was given
    teacher: Experiment | None = None  # of `config.distill`, in training alone

    @property
    def staged(self) -> bool:
        """Whether a step goes through the stages of a pipeline."""
        return self.mesh.pipe > 1 and self.training

    @property
    def micro_steps(self) -> int:
        """Parts of a step's batch whose gradients are summed."""
        if not self.training:
            return 1
        return self.pipeline.microbatches if self.staged else self.train.grad_accumulation

    def rules(self) -> Rules:
        """The layout, every divided dim checked."""
        batch, micro = self.data.batch_size, self.micro_steps
        of = "pipeline.microbatches" if self.staged else "train.grad_accumulation"
        if batch % micro:
            raise ValueError(
                f"config.data.batch_size = {batch} does not divide by config.{of} = {micro}; "
                f"choose a multiple of {micro}, or for config.{of} {self._near(micro)}"
            )
        key = "config.data.batch_size" + (
            f" / config.{of} = {batch} / {micro}" if micro > 1 else ""
        )
        dims = self.model.dims() | self.model.row_dims(
            self.data.sequence_length, self.data.source_length
        )
        dims["batch"] = batch // micro, key
        return make_rules(self.parallel, self.mesh.sizes(), dims, rows=self.in_rows())

    def _near(self, micro: int) -> str:
        """The numbers of micro-batches next to `micro` that the batch allows."""
        batch = self.data.batch_size
        copies = self.mesh.data * self.mesh.fsdp * self.mesh.expert
        rows = batch if batch % copies else batch // copies  # of each copy, which divide, too
        right = [n for n in range(1, rows + 1) if rows % n == 0]
        near = [*[n for n in right if n < micro][-1:], *[n for n in right if n > micro][:1]]
        return " or ".join(map(str, near))

    def in_rows(self) -> bool:
        """Whether the layers lie at rest as the stages use them, or in evaluation if they can."""
        if not self.staged:
            return self.model.layers % self.mesh.pipe == 0
        schedule = self.pipeline.table(self.mesh.pipe)
        layers, period = self.model.layers, len(self.model.pattern)
        return self.pipeline.division(schedule, layers, period).in_rows(schedule)

    def build_model(self) -> Model:
        """The model as pure functions under this layout; call it inside `jax.set_mesh`.

        Raises:
          ValueError: `config.weights`, `config.quantize`, `config.adapter` or
            `config.optimizer.frozen` is of other parameters.
        """
        frozen = self.optimizer.frozen if self.training else ()
        made = freeze(adapted(self._stored(self.model), self.adapter), frozen)
        made = rounded(made, self.quantize)
        if self.teacher is None:
            return made
        widths = self.model.embed_dim, self.teacher.model.embed_dim
        return with_projection(made, self.distill, *widths)

    def build_base(self) -> Model:
        """The model that adapters are on."""
        return self._stored(replace(self.model, prefix_length=0))

    def build_dense(self) -> Model:
        """The model with every weight as one array, and without adapters."""
        return self._made(replace(self.model, prefix_length=0))

    def _stored(self, config: ModelConfig) -> Model:
        return stored(self._made(config), self.weights)

    def _made(self, config: ModelConfig) -> Model:
        pipeline = self.pipeline if self.staged else None
        rules = self.rules()
        return make_model(config, self.objective, self.loss, rules, self.remat, pipeline)

    def distillation(self, student: Model) -> Distillation | None:
        """What the step of `build_model()` is told of a teacher; call it inside `jax.set_mesh`."""
        teacher = self.teacher
        if teacher is None:
            return None
        return Distillation(
            self.distill,
            student,
            teacher.build_model(),
            teacher.precision.compute,
            self.distill.pairs(self.model.layers, teacher.model.layers),
            self.model.vocab_size,
            self.loss,
        )

    def open_data(self, folder: Path) -> Data:
        """The data of this run, whose folder is given."""
        from data.dataset import open_data  # here: it imports grain

        vision = self.model.vision
        image = ImageShape(vision.image_size, vision.patch_size, vision.channels)
        return open_data(
            self.data,
            self.model.vocab_size,
            folder,
            seed=self.seed,
            objective=self.objective,
            image=image if vision.image_size else None,
        )

    def job(self) -> Job:
        """The training step, for the planner."""
        teacher = None
        if self.teacher is not None:
            teacher = replace(self.teacher.job(), micro_steps=self.micro_steps)
        return Job(
            model=self.model,
            mesh=self.mesh,
            parallel=self.parallel,
            precision=self.precision,
            remat=self.remat,
            optimizer=self.optimizer,
            objective=self.objective,
            loss=self.loss,
            batch_size=self.data.batch_size,
            sequence_length=self.data.sequence_length,
            micro_steps=self.micro_steps,
            steps=self.train.steps,
            rules=self.rules(),
            pipeline=self.pipeline if self.staged else None,
            source_length=self.source_length,
            sparsity=self.sparsity,
            distill=self.distill,
            teacher=teacher,
            quantize=self.quantize,
            weights=self.weights,
            adapter=self.adapter,
        )

    @property
    def source_length(self) -> int:
        """What layers attend to besides a row: tokens of its source, or patches of its image; 0
        where they attend to nothing else.
        """
        crosses = self.model.cross != "none"
        return beside_length(self.model, self.data.source_length) * crosses

    def describe_layout(self) -> str:
        """One line: the mesh and what divides what."""
        sizes = " x ".join(f"{axis} {n}" for axis, n in self.mesh.sizes().items() if n > 1)
        parts = [f"mesh {sizes or 'of one device'}"]
        if self.mesh.fsdp > 1:
            parts.append(f"zero {self.parallel.zero}")
        if self.parallel.sequence:
            parts.append("sequence parallel")
        if self.staged:
            name = self.pipeline.table(self.mesh.pipe).name
            parts.append(f"{name} of {self.micro_steps} micro-batches")
            if len(set(self.pipeline.layers)) > 1:
                parts.append(f"layers {' + '.join(map(str, self.pipeline.layers))}")
        parts.append(f"remat {self.remat.policy}")
        precision = self.precision
        same = precision.params == precision.compute
        parts.append(precision.compute if same else f"{precision.params}/{precision.compute}")
        return ", ".join(parts)

    def without_effect(self, backend: str) -> list[str]:
        """What was asked for and does nothing on this mesh or backend, a sentence each."""
        notes = []
        if self.parallel.sequence and self.mesh.tensor == 1:
            notes.append("config.parallel.sequence has no effect: config.mesh.tensor is 1")
        if self.remat.offload and backend == "cpu":
            notes.append(
                "config.remat.offload has no effect: XLA:CPU keeps everything in host memory"
            )
        if self.optimizer.offload and backend == "cpu":
            notes.append(
                "config.optimizer.offload has no effect: XLA:CPU keeps everything in host memory"
            )
        notes += self.pipeline_notes
        notes += self.model.experts.without_effect()
        notes += config_checks.without_effect(self.model)
        notes += self.objective.without_effect()
        notes += self.distill.without_effect()
        notes += self.sparsity.without_effect() + self.adapter.without_effect()
        notes += self.optimizer.without_effect()
        notes += self.quantize.without_effect(backend)
        notes += agree.without_effect(self.data, self.objective)
        if self.loss.z_loss and not self.model.token_head:
            notes.append("config.loss.z_loss has no effect: no token is predicted")
        for tensors, there, why in (
            (EXPERT_TENSORS, self.model.experts.number > 0, "config.experts.number is 0"),
            (CROSS_TENSORS, self.model.cross != "none", "config.model.cross is 'none'"),
        ):
            named = {*self.remat.save, *self.remat.offload} & set(tensors)
            if named and not there:
                listed = ", ".join(sorted(named))
                notes.append(f"{listed} in config.remat has no effect: {why}")
        if self.staged and self.model.unroll > 1:
            notes.append("config.model.unroll has no effect: config.mesh.pipe is not 1")
        if self.precision.accumulate != "float32" and self.micro_steps == 1 and not self.staged:
            notes.append(
                "config.precision.accumulate has no effect: config.train.grad_accumulation is 1"
            )
        return notes


def read_experiment(config: ConfigDict, device_count: int, *, training: bool = True) -> Experiment:
    """The typed config.

    Args:
      config: complete, as `config_border` gives it.
      device_count: over which a mesh axis of -1 is resolved.
      training: whether a step is to be run; what it alone wants is not asked of an evaluation.

    Raises:
      ValueError: naming the key, its value and what would be right.
    """
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"config.seed = {config.seed}: 0 to {2**32 - 1}")
    if config.layout not in LAYOUTS:
        raise ValueError(f"config.layout = {config.layout!r}: choose one of {', '.join(LAYOUTS)}")
    experiment = Experiment(
        seed=config.seed,
        layout=config.layout,
        init_from=config.init_from,
        init_new=fit(config.init_new, tuple[str, ...], "config.init_new"),
        init_drop=fit(config.init_drop, tuple[str, ...], "config.init_drop"),
        model=read_model(config),
        weights=build(WeightsConfig, config.weights, "config.weights"),
        quantize=build(QuantizeConfig, config.quantize, "config.quantize"),
        adapter=build(AdapterConfig, config.adapter, "config.adapter"),
        mesh=build(MeshConfig, config.mesh, "config.mesh").resolve(device_count),
        parallel=build(ParallelConfig, config.parallel, "config.parallel"),
        pipeline=build(PipelineConfig, config.pipeline, "config.pipeline"),
        precision=build(PrecisionConfig, config.precision, "config.precision"),
        remat=build(RematConfig, config.remat, "config.remat"),
        data=build(DataConfig, config.data, "config.data"),
        optimizer=build(OptimizerConfig, config.optimizer, "config.optimizer"),
        sparsity=build(SparsityConfig, config.sparsity, "config.sparsity"),
        objective=build(ObjectiveConfig, config.objective, "config.objective"),
        loss=build(LossConfig, config.loss, "config.loss"),
        train=build(TrainConfig, config.train, "config.train"),
        checkpoint=build(CheckpointConfig, config.checkpoint, "config.checkpoint"),
        eval=build(EvalConfig, config.eval, "config.eval"),
        generate=build(GenerateConfig, config.generate, "config.generate"),
        logging=build(LoggingConfig, config.logging, "config.logging"),
        memory=build(MemoryConfig, config.memory, "config.memory"),
        distill=build(DistillConfig, config.distill, "config.distill"),
        training=training,
    )
    check_objective(experiment.model, experiment.objective)
    check_adapter(experiment)
    if training:
        experiment.sparsity.check_run(experiment.train.steps)
        check_optimizer(experiment)
    if experiment.mesh.expert > 1 and not experiment.model.experts.number:
        raise ValueError(
            f"config.mesh.expert = {experiment.mesh.expert}: there are no experts to divide "
            f"(config.experts.number is 0); set it to 1, and config.mesh.data or fsdp higher"
        )
    data, model = experiment.data, experiment.model
    agree.check_source(data, experiment.objective, model.family)
    check_images(data.sequence_length, model)
    agree.check_lengths(data, experiment.objective, model.max_length)
    best, possible = experiment.checkpoint.best, results(experiment.model)
    if best and best not in possible:
        raise ValueError(
            f"config.checkpoint.best = {best!r}: choose one of {', '.join(possible)}; the step "
            f"with the lowest is kept"
        )
    notes = experiment.pipeline.without_effect(experiment.mesh.pipe)
    experiment = replace(experiment, pipeline_notes=tuple(notes))
    if experiment.staged:
        check_pipeline(experiment)
        experiment = replace(experiment, pipeline=divided(experiment))
    experiment.rules()
    if training and experiment.distill.teacher:
        experiment = replace(experiment, teacher=read_teacher(config, experiment, device_count))
    return experiment


def read_teacher(config: ConfigDict, student: Experiment, device_count: int) -> Experiment:
    """The teacher on the student's data and mesh.

    Raises:
      ValueError: there is none, or it cannot teach this student on this mesh.
    """
    given = teacher_config(config)
    try:
        teacher = read_experiment(given, device_count, training=False)
    except ValueError as error:
        raise ValueError(f"config.distill.teacher = '{config.distill.teacher}': {error}") from error
    check_teacher(student, teacher)
    return teacher


def read_model(config: ConfigDict) -> ModelConfig:
    """`config.model`, its sections of their own and what `config.objective` says of it as one.

    Raises:
      ValueError: naming the key, its value and what would be right.
    """
    objective = build(ObjectiveConfig, config.objective, "config.objective")
    adapter = build(AdapterConfig, config.adapter, "config.adapter")
    parts = {
        "prefix_length": adapter.prefix_length if adapter.method == "prefix" else 0,
        "experts": build(ExpertsConfig, config.experts, "config.experts"),
        "vision": build(VisionConfig, config.vision, "config.vision"),
        "tasks": tuple(objective.tasks.items()),
        "token_head": objective.name != "classification",
    }
    return build(ModelConfig, {**config.model, **parts}, "config.model")
