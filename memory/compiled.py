"""The real training step, compiled ahead of time for a target that need not be here.

Runs in a process started with the target's environment (`compile_for.py` starts it). Sizes are
XLA's own, per device: `Compiled.memory_analysis()`.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
from jax.sharding import NamedSharding

from memory.job import Job
from parallel.mesh import make_mesh
from parallel.targets import Target
from training.batch_arrays import abstract_batch
from training.state import abstract_state

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one step, bytes per device.

    Attributes:
      arguments, outputs, temporaries, aliases, code: of the device's memory.
      host_bytes: arguments and temporaries in the host's memory.
      total_bytes: arguments + outputs + temporaries - aliases.
      lower_seconds, compile_seconds: what it took here.
      out_of_memory: the compiler refused it: `total_bytes` is what it says is needed, and the
        other sizes are 0.
      error: the compiler's own words, where it refused.
      text: the program after all optimisations, scheduled.
    """

    total_bytes: int
    arguments: int = 0
    outputs: int = 0
    temporaries: int = 0
    aliases: int = 0
    code: int = 0
    host_bytes: int = 0
    lower_seconds: float = 0.0
    compile_seconds: float = 0.0
    out_of_memory: bool = False
    error: str | None = None
    text: str = field(default="", repr=False)

    def sizes(self) -> dict[str, Any]:
        """All but the program, as plain data."""
        return {name: value for name, value in asdict(self).items() if name != "text"}


def lower_step(job: Job, devices: list[Any]) -> jax.stages.Lowered:
    """Traces the training step on shapes alone; no array is made."""
    mesh = make_mesh(job.mesh, devices)
    with jax.set_mesh(mesh):
        model, optimizer, step = job.build()
        batch = abstract_batch(job.batch_arrays, job.batch_size, job.rules, mesh)
        # Abstract: the GPUs of a topology know no kinds of memory, and shardings would forget them.
        state = abstract_state(model, optimizer, job.precision, mesh.abstract_mesh)
        teacher = job.teacher_params(mesh.abstract_mesh)
        return jax.jit(step, donate_argnums=0).lower(state, batch, *teacher)


def compile_step(job: Job, target: Target) -> Compiled:
    """Compiles the step for `target`; that it does not fit is a result and no error.

    Raises:
      ValueError: the target's compiler is missing or knows no such topology.
    """
    devices = target.devices()
    return compiled(lambda: lower_step(job, devices), target)


def compiled(lower: Callable[[], jax.stages.Lowered], target: Target) -> Compiled:
    """What the compiler of `target` says of a program; that it does not fit is a result."""
    since = time.perf_counter()
    lowered = lower()
    lowered_at = time.perf_counter()
    try:
        program = lowered.compile(compiler_options=target.compiler_options() or None)
    except jax.errors.JaxRuntimeError as error:
        temporaries = temporaries_refused(str(error))
        if temporaries is None:
            raise
        arguments = argument_bytes(lowered, jax.memory.Space.Device)
        return Compiled(
            arguments + temporaries,
            arguments=arguments,
            temporaries=temporaries,
            host_bytes=argument_bytes(lowered, jax.memory.Space.Host),
            out_of_memory=True,
            error=first_line(str(error)),
        )
    m = program.memory_analysis()
    assert m is not None
    return Compiled(
        total_bytes=m.argument_size_in_bytes
        + m.output_size_in_bytes
        + m.temp_size_in_bytes
        - m.alias_size_in_bytes,
        arguments=m.argument_size_in_bytes,
        outputs=m.output_size_in_bytes,
        temporaries=m.temp_size_in_bytes,
        aliases=m.alias_size_in_bytes,
        code=m.generated_code_size_in_bytes,
        host_bytes=m.host_argument_size_in_bytes
        + m.host_output_size_in_bytes
        + m.host_temp_size_in_bytes
        - m.host_alias_size_in_bytes,
        lower_seconds=lowered_at - since,
        compile_seconds=time.perf_counter() - lowered_at,
        text=program.as_text() or "",
    )


def temporaries_refused(message: str) -> int | None:
    """The temporaries of a program that a compiler refused; None where memory is not the reason.

    XLA's words: "the total memory required for HLO temporaries (48.46G) exceeds available HBM".
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"temporaries \(([0-9.]+)([KMGT]?)\) exceeds", message)
    return int(float(found[1]) * UNITS[found[2]]) if found else None


def argument_bytes(lowered: jax.stages.Lowered, space: Any) -> int:
    """Bytes of a step's arguments in one memory, per device; donated state is written in place."""
    total = 0
    for info in jax.tree.leaves(lowered.args_info):
        aval = info._aval
        sharding = NamedSharding(aval.sharding.mesh, aval.sharding.spec)
        if aval.memory_space == space:
            total += math.prod(sharding.shard_shape(aval.shape)) * aval.dtype.itemsize
    return total


def first_line(message: str) -> str:
    """An error's first line, without the codes before it."""
    line = next((line.strip() for line in message.splitlines() if line.strip()), "")
    return line.removeprefix("RESOURCE_EXHAUSTED: ")[:300]
