"""The step: a pure function (state, batch) -> (state, metrics), compiled once, state donated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from parallel.precision import PrecisionConfig
from parallel.zero import for_model, zeros_like_gradients
from training.distill import Distillation
from training.micro_batches import Batch, Weights, loss_weights, means, split
from training.naming import completed
from training.optim import Optimizer, apply_update
from training.pipelined import pipelined_loss_and_grads
from training.sparsity import NO_SPARSITY, Sparsity
from training.state import Model, TrainState
from training.zeros import without_gradient

Tree = Any
Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]  # (state, batch[, teacher])
LossAndGrads = Callable[..., tuple[dict[str, jax.Array], Tree]]

ROUNDING = 0x726F756E  # a key of its own: the loss draws from the step's


def loss_and_grads(
    model: Model,
    precision: PrecisionConfig,
    micro_steps: int = 1,
    distillation: Distillation | None = None,
) -> LossAndGrads:
    """The one interface between a layout and the step.

    Returns:
      (master params, batch, key or None, loss scale) -> (sums, gradients). The sums are float32:
      `tokens`, and means over them (`loss` and what the model's loss reports: `nll`, `correct`,
      `z`). Gradients are of the mean, times the loss scale, divided as `rules.of_gradient`; in
      compute dtype with one micro-step, else in `precision.accumulate`. Only `model.trained`
      parameters have one. With `distillation` the teacher's parameters are one argument more.
    """
    if model.pipeline is not None:  # micro-steps are the micro-batches of its schedule
        assert distillation is None, "refused with the config"
        return pipelined_loss_and_grads(model, precision, micro_steps)

    def of_batch(
        params: Tree, batch: Batch, key: jax.Array | None, scale: jax.Array, *teacher: Tree
    ) -> tuple[dict[str, jax.Array], Tree]:
        all_leaves, build = for_model(params, model.axes, model.rules, precision.compute)
        leaves = model.trained(all_leaves)
        weights, tokens = loss_weights(batch, scale)

        loss_of: Callable[..., Any] = model.loss
        teach: Callable[[Batch], tuple[Any, ...]] = _no_lesson
        if distillation is not None:
            loss_of, teach = distillation.of_student, distillation.lessons(*teacher)

        def loss(
            leaves: Tree, batch: Batch, weights: Weights, key: jax.Array | None, *lesson: Tree
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            return loss_of(build(completed(leaves, all_leaves)), batch, weights, key, *lesson)

        def taught(
            function: Callable[..., Any], batch: Batch, weights: Weights, key: jax.Array | None
        ) -> Any:
            """A function like `loss`, after the teacher's forward pass, which is no part of it."""
            batch, *lesson = teach(batch)
            return function(leaves, batch, weights, key, *lesson)

        grad = jax.value_and_grad(loss, has_aux=True)
        if micro_steps == 1:
            (total, aux), grads = taught(grad, batch, weights, key)
        else:
            own, axes = model.trained(params), model.trained(model.axes)
            buffer = zeros_like_gradients(own, axes, model.rules, precision.accumulate)
            parts = jax.tree.map(lambda a: split(a, micro_steps), (batch, weights))

            def micro_step(carry: Tree, xs: Tree) -> tuple[Tree, None]:
                (batch, weights), index = xs
                micro_key = None if key is None else jax.random.fold_in(key, index)
                value, grads = taught(grad, batch, weights, micro_key)
                grads = jax.tree.map(lambda g: g.astype(precision.accumulate), grads)
                return jax.tree.map(jnp.add, carry, (value, grads)), None

            zeros = jax.tree.map(
                lambda s: jnp.zeros(s.shape, s.dtype),
                jax.eval_shape(partial(taught, loss), *jax.tree.map(lambda a: a[0], parts), key),
            )
            xs = (parts, jnp.arange(micro_steps))
            ((total, aux), grads), _ = jax.lax.scan(micro_step, (zeros, buffer), xs)
        return means(total, aux, scale, tokens), grads

    return of_batch


def _no_lesson(batch: Batch) -> tuple[Any, ...]:
    return (batch,)


def make_step(
    model: Model,
    optimizer: Optimizer,
    schedule: optax.Schedule,
    precision: PrecisionConfig,
    *,
    seed: int,
    micro_steps: int = 1,
    stochastic: bool = False,
    distillation: Distillation | None = None,
    sparsity: Sparsity = NO_SPARSITY,
) -> Step:
    """The training step; jit it with `donate_argnums=0`.

    Args:
      stochastic: bfloat16 parameters and moments are rounded by chance (`training.rounding`).
      distillation: with it the step takes the teacher's parameters, too, and keeps them as they
        are.
      sparsity: weights become zero by its schedule before the gradient is taken, and zeros stay;
        the optimizer is to be made with `zeros=sparsity.names`.

    An update whose gradient is not finite is skipped and counted, and the loss scale halves.
    """
    grads_of = loss_and_grads(model, precision, micro_steps, distillation)

    def step(
        state: TrainState, batch: Batch, *teacher: Tree
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        scale = state.loss_scale.scale
        params = sparsity.pruned(state.params, state.step)
        metrics, grads = grads_of(params, batch, key, scale, *teacher)
        if sparsity.names:
            grads = without_gradient(grads, params, sparsity.names)
            metrics["sparsity"] = sparsity.zeros(params)
        params, opt_state, grad_norm, finite = apply_update(
            optimizer,
            grads,
            state.opt_state,
            params,
            scale=scale,
            rounding=jax.random.fold_in(key, ROUNDING) if stochastic else None,
        )
        skipped = state.skipped + (1 - finite.astype(jnp.int32))
        metrics |= {
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step - state.skipped),  # skipped steps do not count
            "skipped": skipped,
            "finite": finite,
        }
        if precision.scaled:
            metrics["loss_scale"] = scale
        loss_scale = state.loss_scale.update(precision, finite)
        return TrainState(state.step + 1, params, opt_state, loss_scale, skipped), metrics

    return step
