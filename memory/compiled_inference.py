"""Prefill, a step of decoding and a step of evaluation, compiled for a target as training's is.

Runs in a process started with the target's environment, see `memory/compiled.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from memory.compiled import Compiled, compiled
from memory.inference_job import DONATED, PHASES, InferenceJob
from memory.job import Job
from parallel.mesh import make_mesh
from parallel.targets import Target
from training.batch_arrays import abstract_batch
from training.evaluation import make_eval_step
from training.objectives import make_model
from training.state import placed_params


def lower_phase(job: InferenceJob, phase: str, devices: list[Any]) -> jax.stages.Lowered:
    """Traces one of `PHASES` on shapes alone."""
    mesh = make_mesh(job.mesh, devices)
    with jax.set_mesh(mesh):
        function, shapes = job.programs(mesh)[phase]
        # What a phase does not read, such as an encoder's weights, is on the device all the same.
        return jax.jit(function, donate_argnums=DONATED, keep_unused=True).lower(*shapes)


def compile_inference(job: InferenceJob, target: Target) -> dict[str, Compiled]:
    """Phase -> what the compiler says of it.

    Raises:
      ValueError: the target's compiler is missing or knows no such topology.
    """
    devices = target.devices()
    return {
        phase: compiled(lambda phase=phase: lower_phase(job, phase, devices), target)  # type: ignore[misc]
        for phase in PHASES
    }


def compile_evaluation(job: Job, target: Target) -> Compiled:
    """The step of evaluate.py; `job` is that of an experiment that is not for training.

    Raises:
      ValueError: the target's compiler is missing or knows no such topology.
    """
    devices = target.devices()

    def lower() -> jax.stages.Lowered:
        mesh = make_mesh(job.mesh, devices)
        with jax.set_mesh(mesh):
            model = make_model(job.model, job.objective, job.loss, job.rules, job.remat)
            params = placed_params(model, job.precision, mesh.abstract_mesh)
            batch = abstract_batch(job.batch_arrays, job.batch_size, job.rules, mesh)
            # A tokenizer's table is a constant of the program; of one number it would be none.
            token_bytes = np.arange(job.model.vocab_size) % 7
            step = make_eval_step(model, job.precision, token_bytes)
            return jax.jit(step).lower(params, batch)

    return compiled(lower, target)
