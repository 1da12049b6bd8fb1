"""One layout measured on the devices that are here: seconds of a step, and bytes in use."""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax

from memory.job import Job
from parallel.compilation import safe_compilation
from parallel.mesh import make_mesh
from training.batch_arrays import random_batch
from training.state import create_state, drawn_params


def _drawn(teacher: Job) -> Any:
    return drawn_params(teacher.build_model(), teacher.precision, 1)


def measure_step(job: Job, *, steps: int = 5) -> dict[str, Any]:
    """Runs the training step on one repeated batch of random tokens.

    Args:
      steps: timed ones, after two that are not.

    Returns:
      {"total_bytes": the allocator's peak on the fullest device, None where it keeps none (CPU),
      "state_bytes": of the state between two steps, "seconds": the median,
      "tokens_per_second"}.
    """
    mesh = make_mesh(job.mesh)
    with jax.set_mesh(mesh):
        model, optimizer, step = job.build()
        state = create_state(model, optimizer, job.precision, 0, mesh)
        batch = random_batch(job.batch_arrays, job.batch_size, job.rules, mesh)
        taught = [] if job.teacher is None else [_drawn(job.teacher)]
        jitted = jax.jit(step, donate_argnums=0)
        compiled = jitted.lower(state, batch, *taught).compile(safe_compilation())
        seconds = []
        for _ in range(steps + 2):
            since = time.perf_counter()
            state, metrics = compiled(state, batch, *taught)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - since)
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    median = statistics.median(seconds[2:])
    return {
        "total_bytes": max(peaks) if len(peaks) == len(stats) else None,
        "state_bytes": sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(state)),
        "seconds": median,
        "tokens_per_second": job.batch_size * job.sequence_length / median,
    }
