"""What `pipeline.py` measures: the quickstart's model in as many layers as stages want, compiled.

A micro-batch is 16 rows of 128 tokens: 2,048 rows of every product.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from configs import tiny
from experiment import Experiment, read_experiment
from parallel.compilation import quick_compilation
from parallel.mesh import make_mesh
from training.state import Model
from training.step import loss_and_grads

ROWS = 16  # sequences of a micro-batch
BATCH = ("tokens", "targets", "segments", "positions")
Make = Callable[[Model, Experiment], Callable[..., Any]]


def staged(
    mesh: Mapping[str, int], microbatches: int, layers: int = 8, **changes: Any
) -> Experiment:
    """The experiment; `changes` are keys of its config, SECTION__KEY."""
    config = tiny.get_config()
    config.mesh.update({"data": 1, **mesh})
    config.model.layers = layers
    config.data.batch_size = ROWS * microbatches
    config.pipeline.microbatches = microbatches
    if config.mesh.pipe == 1:  # the same micro-batches, one after the other
        config.train.grad_accumulation = microbatches
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return read_experiment(config, math.prod(mesh.values()))


def ours(model: Model, experiment: Experiment) -> Callable[..., Any]:
    """What the training step takes its gradients from."""
    return loss_and_grads(model, experiment.precision, experiment.micro_steps)


class Program:
    """Loss and gradients of an experiment on the first devices, compiled.

    Attributes:
      temporaries, arguments: bytes on one device.
    """

    def __init__(self, experiment: Experiment, make: Make = ours) -> None:
        sizes = experiment.mesh.sizes().values()
        self.mesh = make_mesh(experiment.mesh, jax.devices()[: math.prod(sizes)])
        self.data = experiment.data
        with jax.set_mesh(self.mesh):
            self.model = experiment.build_model()
            self.lowered = jax.jit(make(self.model, experiment)).lower(*self.inputs(abstract=True))
        self.compiled = self.lowered.compile()
        memory: Any = self.compiled.memory_analysis()
        self.temporaries: int = memory.temp_size_in_bytes
        self.arguments: int = memory.argument_size_in_bytes

    def inputs(self, *, abstract: bool = False) -> tuple[Any, ...]:
        """(params, batch, key, loss scale): of seeds, or shapes alone."""
        sharding = NamedSharding(self.mesh, self.model.rules.spec("batch seq"))
        shape = self.data.batch_size, self.data.sequence_length

        def drawn() -> tuple[Any, ...]:
            return self.model.init(jax.random.key(0)), jax.random.key(1), jnp.float32(1)

        with jax.set_mesh(self.mesh):
            draw = jax.jit(drawn, compiler_options=quick_compilation())
            params, key, scale = jax.eval_shape(drawn) if abstract else draw()
        if abstract:
            rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
            return params, dict.fromkeys(BATCH, rows), key, scale
        tokens = np.random.default_rng(0).integers(0, 256, (shape[0], shape[1] + 1), np.int32)
        ones = np.ones(shape, np.int32)
        places = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        arrays = tokens[:, :-1], tokens[:, 1:], ones, places
        batch = dict(zip(BATCH, arrays, strict=True))
        return params, jax.device_put(batch, sharding), key, scale

    @cached_property
    def given(self) -> tuple[Any, ...]:
        """The inputs that every run takes."""
        return self.inputs()

    def run(self) -> Any:
        """(sums, gradients), when they are there."""
        return jax.block_until_ready(self.compiled(*self.given))


def take_turns(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in every round, in turns; a first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            since = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - since)
    for name, times in seconds.items():
        print(f"{name}: median {statistics.median(times):.3f} s", file=sys.stderr, flush=True)
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over rounds of the ratio within a round, in which a busy neighbour slows both."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def busy() -> float:
    """Processes that wanted a core in the last minute: how far the seconds can be trusted."""
    return os.getloadavg()[0]
