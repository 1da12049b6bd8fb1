"""What F, B and W of one stage take where nothing waits: each stage in a loop of its own, at once.

Loops of the forward pass alone, with the gradient by the input, and with that by the weights, too;
costs are their differences. Nothing is sent and nothing outlives an iteration, so what the executor
takes more is its own: buffers, branches, transfers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from staged import Program

from experiment import Experiment
from parallel.mesh import PIPE
from parallel.schedule_costs import Costs
from parallel.zero import laid_out
from training.micro_batches import split, token_weights
from training.state import Model

LOOPS = ("forward", "input gradient", "all gradients", "embedding", "loss")
Body = Callable[[Any, jax.Array, Any], Any]


@dataclass(frozen=True)
class Alone:
    """Loops over as many micro-batches as the schedule has.

    Attributes:
      runs: one call of each.
      microbatches: of one call.
      again: layers are computed again in the backward pass, as the policy `full` has it.
    """

    runs: dict[str, Callable[[], Any]]
    microbatches: int
    again: bool

    def costs(self, seconds: Mapping[str, Sequence[float]], number: int) -> Costs:
        """Seconds of a micro-batch by stage, from one round's `seconds` of the `runs`."""
        f, fb, fbw, embed, loss = (seconds[name][number] / self.microbatches for name in LOOPS)
        b, w = max(0.0, fb - f), max(0.0, fbw - fb)
        if self.again:  # the last stage's forward pass is that of its backward pass
            return Costs([f + embed / 2, 0.0], [b + embed / 2, b + loss], w, recompute=f)
        return Costs([f + embed / 2, f + loss], [b + embed / 2, b], w)


def stage_costs(experiment: Experiment) -> Alone:
    """Compiles the loops for two stages."""
    assert experiment.mesh.pipe == 2
    programs = {name: Program(experiment, maker(body)) for name, body in bodies().items()}
    runs = {name: program.run for name, program in programs.items()}
    return Alone(runs, experiment.micro_steps, experiment.remat.policy == "full")


def bodies() -> dict[str, Callable[[Model], Body]]:
    """For each loop, the model's function (params, x_BTD, micro-batch) of one iteration."""

    def blocks(model: Model, params: Any, x_BTD: jax.Array, part: Any) -> jax.Array:
        batch, _, key = part
        return cut(model).blocks(params, x_BTD, batch, key, jnp.int32(0))

    def forward(model: Model) -> Body:
        return lambda params, x_BTD, part: blocks(model, params, x_BTD, part)

    def input_gradient(model: Model) -> Body:
        def run(params: Any, x_BTD: jax.Array, part: Any) -> Any:
            y_BTD, back = jax.vjp(lambda x: blocks(model, params, x, part), x_BTD)
            return back(y_BTD)

        return run

    def all_gradients(model: Model) -> Body:
        def run(params: Any, x_BTD: jax.Array, part: Any) -> Any:
            y_BTD, back = jax.vjp(lambda p, x: blocks(model, p, x, part), params, x_BTD)
            return back(y_BTD)

        return run

    def embedding(model: Model) -> Body:
        def run(params: Any, x_BTD: jax.Array, part: Any) -> Any:
            batch, _, key = part
            y_BTD, back = jax.vjp(lambda p: cut(model).embed(p, batch, key), params)
            return y_BTD, back(x_BTD)

        return run

    def loss(model: Model) -> Body:
        def run(params: Any, x_BTD: jax.Array, part: Any) -> Any:
            batch, weights_BT, _ = part
            of = lambda p, x: cut(model).loss(p, x, batch, weights_BT)
            return jax.value_and_grad(of, argnums=(0, 1), has_aux=True)(params, x_BTD)

        return run

    return dict(zip(LOOPS, (forward, input_gradient, all_gradients, embedding, loss), strict=True))


def cut(model: Model) -> Any:
    assert model.cut is not None
    return model.cut


def maker(body: Callable[[Model], Body]) -> Callable[[Model, Experiment], Callable[..., Any]]:
    """A function like loss and gradients that runs `body` for each micro-batch, on each stage."""

    def make(model: Model, experiment: Experiment) -> Callable[..., Any]:
        run_body, m = body(model), experiment.micro_steps
        tree: Any
        names, tree = jax.tree.flatten(model.axes)
        by_stage = tree.unflatten([P(PIPE) if n.split()[0] == "layers" else P() for n in names])

        def stage(leaves: Any, batch: Any, weights_MBT: jax.Array, key: Any) -> Any:
            first = jax.tree.map(lambda a: a[0], batch)
            x_BTD = cut(model).embed(leaves, first, key)
            like = jax.eval_shape(run_body, leaves, x_BTD, (first, weights_MBT[0], key))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), like)

            def iteration(carry: Any, xs: Any) -> tuple[Any, None]:
                x_BTD, sums = carry
                batch, weights_BT = xs
                new = run_body(leaves, x_BTD, (batch, weights_BT, key))
                # What is next depends on what was, or the compiler would run the body once.
                small = jax.tree.leaves(new)[0].ravel()[0].astype(x_BTD.dtype)
                return (x_BTD + 1e-9 * small, jax.tree.map(jnp.add, sums, new)), None

            (x_BTD, sums), _ = lax.scan(iteration, (x_BTD, zeros), (batch, weights_MBT))
            total = sum(jnp.sum(a).astype(jnp.float32) for a in jax.tree.leaves((x_BTD, sums)))
            return jnp.reshape(total, (1,))

        run: Any = jax.shard_map(
            stage,
            in_specs=(by_stage, P(), P(), P()),
            out_specs=P(PIPE),
            axis_names={PIPE},
            check_vma=False,
        )

        def of_batch(params: Any, batch: Any, key: Any, scale: jax.Array) -> Any:
            leaves, _ = laid_out(params, model.axes, model.rules, experiment.precision.compute)
            weights_BT, _ = token_weights(batch, scale)
            parts = jax.tree.map(lambda a: split(a, m), (batch, weights_BT))
            return run(leaves, *parts, key)

        return of_batch

    return make
