"""Five steps of a family on a mesh, and how far they are from those on one device."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parallel.pipeline import PipelineConfig
from parallel.precision import PrecisionConfig
from tests.families import FAMILIES
from tests.small import layout
from tests.training.stages import FLOAT32, TOLERANCE, shares
from training.state import abstract_params
from training.step import loss_and_grads

Cell = dict[str, Any]
STEPS = 5
MESHES: dict[str, Cell] = {
    "data": dict(data=8),
    "fsdp": dict(fsdp=8, zero=3),
    "fsdp and data": dict(fsdp=4, data=2, zero=2),
    "tensor": dict(tensor=8, sequence=True),
    "all": dict(data=2, fsdp=2, tensor=2, zero=3, sequence=True),
}
OF_EXPERTS: dict[str, Cell] = {
    "expert": dict(expert=8),
    "expert and data": dict(data=2, expert=4),
    "expert, fsdp and data": dict(data=2, fsdp=2, expert=2, zero=2),
    "expert and all": dict(fsdp=2, expert=2, tensor=2, zero=3, sequence=True),
    "expert, full": dict(data=2, fsdp=2, expert=2, zero=3, remat="full"),
    "expert, dots": dict(data=2, fsdp=2, expert=2, zero=3, remat="dots"),
    "expert, attention": dict(data=2, fsdp=2, expert=2, zero=3, remat="attention"),
    "expert, 1f1b": dict(pipe=2, fsdp=2, expert=2, zero=3, schedule="1f1b", microbatches=2),
    "expert, zb_h1": dict(pipe=2, fsdp=2, expert=2, zero=3, schedule="zb_h1", microbatches=2),
}
# Stages between the first and the last; B and W of one apart in the second.
STAGED: dict[str, Cell] = {
    "1f1b": dict(pipe=2, fsdp=2, tensor=2, zero=3, sequence=True, schedule="1f1b"),
    "zb_h1": dict(pipe=4, fsdp=2, zero=2, schedule="zb_h1"),
}
CELLS = MESHES | OF_EXPERTS | STAGED


def cells(name: str) -> list[str]:
    """Those that a family has."""
    experts = FAMILIES[name].config.experts.number
    return [cell for cell in CELLS if experts or cell not in OF_EXPERTS]


@functools.cache
def drawn(name: str) -> Any:
    """Parameters as NumPy, of which none is where a gradient vanishes, as a gate of zero is."""
    family = FAMILIES[name]
    with layout(config=family.config, objective=family.objective) as laid:
        shapes = abstract_params(laid.model, FLOAT32)
    rng = np.random.default_rng(0)

    def draw(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        centre = 1 if path[-1].key == "gain" else 0
        return rng.normal(centre, 0.1, shape.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def five_steps(name: str, micro_steps: int, **kind: Any) -> list[tuple[dict[str, float], Any]]:
    """(metrics, gradients as NumPy) of each step of gradient descent."""
    family = FAMILIES[name]
    with layout(config=family.config, objective=family.objective, **kind) as laid:
        params = laid.params(drawn(name))
        grads_of = loss_and_grads(laid.model, PrecisionConfig(), micro_steps)

        @jax.jit
        def step(params: Any, batch: Any, number: jax.Array) -> Any:
            key = jax.random.fold_in(jax.random.key(7), number)
            metrics, grads = grads_of(params, batch, key, jnp.float32(1))
            at_rest = jax.tree.map(
                lambda p, g: jax.reshard(g, jax.typeof(p).sharding.spec), params, grads
            )
            return jax.tree.map(lambda p, g: p - family.rate * g, params, at_rest), metrics, grads

        steps = []
        for number in range(STEPS):
            params, metrics, grads = step(params, laid.placed(family.batch(number % 2)), number)
            metrics = {metric: float(value) for metric, value in metrics.items()}
            steps.append((metrics, jax.tree.map(np.asarray, grads)))
        assert step._cache_size() == 1
        return steps


@functools.cache
def alone(name: str, micro_steps: int) -> list[tuple[dict[str, float], Any]]:
    return five_steps(name, micro_steps)


def check_learns(name: str, micro_steps: int) -> None:
    """Otherwise every layout might agree on doing nothing."""
    steps = alone(name, micro_steps)
    for _, grads in steps:
        for path, grad in jax.tree.leaves_with_path(grads):
            assert np.any(grad != 0), jax.tree_util.keystr(path)
    losses = [metrics["loss"] for metrics, _ in steps]
    assert losses[-1] < losses[0] - 0.02, losses


def apart(name: str, *, schedule: str = "", microbatches: int = 4, **kind: Any) -> dict[str, float]:
    """The largest differences over all steps from one device that makes the same micro-batches.

    Args:
      schedule: of stages, where `kind` has some, with its micro-batches.
      kind: of a layout, as `tests.small.layout` has it.

    Returns:
      `loss`, relative; `gradient`, of one tensor as a share of max(its norm, 1e-3 of the norm of
      all); `metrics`, of another metric as a share of its size and 0.1.
    """
    micro_steps = 1
    if schedule:
        micro_steps = microbatches
        kind["pipeline"] = PipelineConfig(schedule, microbatches=micro_steps)
    check_learns(name, micro_steps)
    loss, gradient, other = [], [], [0.0]
    steps = zip(five_steps(name, micro_steps, **kind), alone(name, micro_steps), strict=True)
    for (here, got), (there, want) in steps:
        # Stages report no losses of routers.
        assert here.keys() <= there.keys() if schedule else here.keys() == there.keys()
        loss.append(abs(here["loss"] / there["loss"] - 1))
        gradient += shares(got, want).values()
        other += [abs(here[m] - there[m]) / (abs(there[m]) + 0.1) for m in here if m != "loss"]
    largest = {"loss": loss, "gradient": gradient, "metrics": other}
    return {name: float(np.max(values)) for name, values in largest.items()}  # NaN if one is


def assert_same(name: str, **kind: Any) -> None:
    """Within the tolerance of `tests/training/test_layouts.py`."""
    found = apart(name, **kind)
    assert all(value <= TOLERANCE for value in found.values()), (name, kind, found)
