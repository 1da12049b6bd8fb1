"""GPipe by autodiff: the pipeline that JAX trainers have, which ours is held against.

One scan over m + p - 1 ticks inside `shard_map` over the pipe axis. In each, every stage runs its
layers on what the stage before it sent, stage 0 on the next micro-batch; outputs go round by one
`ppermute`. The whole is differentiated, so that the backward pass is the scan in reverse and what
each tick kept lives until then. So it is in GPipe (https://arxiv.org/abs/1811.06965) as GSPMD
(https://arxiv.org/abs/2105.04663, section 3.3) and its trainers write it. It has the interface of
`training.step.loss_and_grads` and takes the same model, cut at the same places.

Written to be as good as this form is: stages that have nothing to do compute on what lies there,
for without divergent branches that costs no time on devices of their own; weights' gradients are
summed by the scan's transpose, none is kept by tick; the head is divided over the stages, each
taking the last stage's outputs of m / p micro-batches, in one call; `full` keeps a stage's input of
each tick and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from parallel.mesh import PIPE
from parallel.precision import PrecisionConfig
from parallel.rules import is_staged
from parallel.zero import laid_out
from training.micro_batches import Batch, Weights, loss_weights, means, split
from training.state import Model

Tree = Any


def loss_and_grads(
    model: Model, precision: PrecisionConfig, microbatches: int, *, full: bool
) -> Callable[..., tuple[dict[str, jax.Array], Tree]]:
    """`training.step.loss_and_grads` of a model on a mesh of pipe, and tensor if need be.

    Args:
      model: with a `cut`.
      precision: gradients are in its compute dtype.
      microbatches: a multiple of the stages, since the head is divided over them.
      full: a stage is computed again in the backward pass; otherwise all its residuals are kept.
    """
    cut, rules = model.cut, model.rules
    assert cut is not None
    m, p = microbatches, rules.size((PIPE,))
    each, last = cut.layers // p, p - 1
    tree: Any
    names, tree = jax.tree.flatten(model.axes)
    by_stage = tree.unflatten([P(PIPE) if is_staged(n) else P() for n in names])

    def blocks(
        params: Tree, x_BTD: jax.Array, batch: Batch, key: Any, stage: Any, weights: Weights
    ) -> jax.Array:
        return cut.blocks(params, x_BTD, batch, key, stage * each, weights)

    run_blocks = jax.checkpoint(blocks) if full else blocks

    def loss(
        leaves: Tree, batch: Tree, weights: Tree, key: jax.Array | None, stage: jax.Array
    ) -> tuple[jax.Array, Tree]:
        """The part of the loss that this stage computes; over all stages it sums to the loss."""

        def tick(sent_BTD: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
            index = jnp.clip(t - stage, 0, m - 1)
            part, of_part = jax.tree.map(
                lambda a: lax.dynamic_index_in_dim(a, index, 0, False), (batch, weights)
            )
            own = key if key is None or m == 1 else jax.random.fold_in(key, index)
            x_BTD = jnp.where(stage == 0, cut.embed(leaves, part, own), sent_BTD)
            y_BTD = run_blocks(leaves, x_BTD, part, own, stage, of_part)
            return lax.ppermute(y_BTD, PIPE, [(s, s + 1) for s in range(last)]), y_BTD

        first = jax.tree.map(lambda a: a[0], batch)
        like = jax.eval_shape(lambda: cut.embed(leaves, first, key))
        start = jnp.zeros(like.shape, like.dtype, out_sharding=like.sharding.spec)
        _, y_MBTD = lax.scan(tick, start, jnp.arange(m + last))

        def mine(array: jax.Array) -> jax.Array:
            """Of this stage's m / p micro-batches, which are one to the head."""
            part = lax.dynamic_slice_in_dim(array, stage * (m // p), m // p)
            return jnp.reshape(part, (-1, *array.shape[2:]))

        outputs = jnp.where(stage == last, y_MBTD[last:], 0)
        x_BTD = lax.psum_scatter(outputs, PIPE, tiled=True)
        x_BTD = jnp.reshape(x_BTD, (-1, *x_BTD.shape[2:]))
        return cut.loss(leaves, x_BTD, jax.tree.map(mine, batch), jax.tree.map(mine, weights))

    def stage(
        leaves: Tree, batch: Tree, weights: Tree, key: Any, number: jax.Array
    ) -> tuple[Tree, Tree]:
        grad = jax.value_and_grad(loss, has_aux=True)
        sums, grads = grad(leaves, batch, weights, key, number[0])

        def summed(array: jax.Array, spec: P) -> jax.Array:
            return array if spec == P(PIPE) else lax.psum(array, PIPE)

        return lax.psum(sums, PIPE), jax.tree.map(summed, grads, by_stage)

    run: Any = jax.shard_map(
        stage,
        in_specs=(by_stage, P(), P(), P(), P(PIPE)),
        out_specs=(P(), by_stage),
        axis_names={PIPE},
        check_vma=False,
    )

    def of_batch(
        params: Tree, batch: Batch, key: jax.Array | None, scale: jax.Array
    ) -> tuple[dict[str, jax.Array], Tree]:
        leaves, copy = laid_out(params, model.axes, rules, precision.compute)
        assert copy is None, "ZeRO level 2 is not written here"
        weights, tokens = loss_weights(batch, scale)
        parts = jax.tree.map(lambda a: split(a, m), (batch, weights))
        (total, aux), grads = run(leaves, *parts, key, jnp.arange(p))

        def at_rest(array: jax.Array, names: str) -> jax.Array:
            return jax.reshard(array, rules.of_gradient(names, array.shape))

        return means(total, aux, scale, tokens), jax.tree.map(at_rest, grads, model.axes)

    return of_batch
