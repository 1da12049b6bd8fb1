"""Loss and gradients of a model whose layers are divided over the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from parallel.mesh import PIPE
from parallel.pipeline import check_size, run_pipeline, stage_rows
from parallel.precision import PrecisionConfig
from parallel.zero import laid_out
from training.micro_batches import Batch, loss_weights, means, split
from training.state import Model

Tree = Any


def pipelined_loss_and_grads(
    model: Model, precision: PrecisionConfig, microbatches: int
) -> Callable[..., tuple[dict[str, jax.Array], Tree]]:
    """`training.step.loss_and_grads` by a schedule; gradients are in `precision.accumulate`.

    Raises:
      ValueError: the schedule is none for these stages and micro-batches, or the model has too few
        layers for its chunks.
    """
    cut, pipeline, rules = model.cut, model.pipeline, model.rules
    assert cut is not None
    assert pipeline is not None
    stages = rules.size((PIPE,))
    schedule = pipeline.table(stages, microbatches)
    check_size(schedule, stages, microbatches)  # before anything is laid out for it
    division = pipeline.division(schedule, cut.layers, cut.period)
    rows = stage_rows(schedule, division)

    def of_batch(
        params: Tree, batch: Batch, key: jax.Array | None, scale: jax.Array
    ) -> tuple[dict[str, jax.Array], Tree]:
        leaves, copy = laid_out(params, model.axes, rules, precision.compute, rows)
        weights, tokens = loss_weights(batch, scale)
        parts = jax.tree.map(lambda a: split(a, microbatches), (batch, weights))
        (total, aux), grads, _ = run_pipeline(
            cut,
            schedule,
            division,
            rules,
            model.axes,
            leaves,
            copy,
            parts,
            key,
            precision.accumulate,
        )
        return means(total, aux, scale, tokens), model.trained(grads)

    return of_batch
