"""What F, B and W of a stage take by themselves: its own actions in a loop, where nothing waits.

Each loop runs one kind of action of the executor, for all micro-batches, on both stages at once: it
reads and writes the same buffers as in the schedule, in the table's slots, but nothing is sent, no
condition decides, and no stage waits for another. The first and the last stage have the embedding
and the loss in addition; each is a loop of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.staged import Program, ours
from experiment import Experiment
from parallel.mesh import PIPE
from parallel.schedule_costs import Costs
from parallel.schedule_program import make_program
from parallel.stage import Carry, Row, Stage
from training.state import Model

MIDDLE, FIRST, LAST = -1, 0, 1  # positions of two stages: of neither, of the first, of the last
LOOPS = {
    "F, embedding": ("F", FIRST),
    "F, loss": ("F", LAST),
    "B and W": ("BW", MIDDLE),
    "B and W, embedding": ("BW", FIRST),
    "B": ("B", MIDDLE),
    "B, embedding": ("B", FIRST),
    "W": ("W", MIDDLE),
}
BACKWARD = {True: "B and W", False: "B"}  # by whether they are fused


@dataclass(frozen=True)
class Alone:
    """The loops of a schedule.

    Attributes:
      runs: one call of each.
      microbatches: of one call.
      fused: of each stage, whether all its B and W are one action.
    """

    runs: dict[str, Callable[[], Any]]
    microbatches: int
    fused: tuple[bool, bool]

    def costs(self, seconds: Mapping[str, Sequence[float]], number: int) -> Costs:
        """Seconds of a micro-batch by stage, from one round's `seconds` of the `runs`."""

        def of(name: str) -> float:
            return seconds[name][number] / self.microbatches

        first, last = self.fused
        backward = [of(f"{BACKWARD[first]}, embedding"), of(BACKWARD[last])]
        weight = [0.0 if fused else of("W") for fused in self.fused]
        return Costs([of("F, embedding"), of("F, loss")], backward, weight)


def stage_costs(experiment: Experiment) -> Alone:
    """Compiles the loops for two stages."""
    assert experiment.mesh.pipe == 2
    program = make_program(experiment.pipeline.table(2, experiment.micro_steps))
    apart = (program.weight.microbatch >= 0) & ~program.fused
    first, last = (not apart[:, stage].any() for stage in range(2))
    names = ["F, embedding", "F, loss", f"{BACKWARD[first]}, embedding", BACKWARD[last]]
    names += [] if first and last else ["W"]
    runs = {name: Program(experiment, maker(*LOOPS[name])).run for name in names}
    return Alone(runs, experiment.micro_steps, (first, last))


def maker(kind: str, position: int) -> Callable[[Model, Experiment], Callable[..., Any]]:
    """A function like loss and gradients that runs one kind of action on both stages."""

    def make(model: Model, experiment: Experiment) -> Callable[..., Any]:
        run = ours(model, experiment)

        def of_batch(*args: Any) -> Any:
            with mock.patch("parallel.pipeline.Stage", stage_class(kind, position)):
                return run(*args)

        return of_batch

    return make


def stage_class(kind: str, position: int) -> type[Stage]:
    """A stage that runs nothing else of its table."""

    class Loop(Stage):
        def run(self, table: Any) -> tuple[Carry, jax.Array]:
            columns = {"F": self.program.forward, "W": self.program.weight}
            ticks = [
                np.flatnonzero(c >= 0)
                for c in columns.get(kind, self.program.backward).microbatch.T
            ]
            mine = jnp.asarray(np.stack(ticks))[lax.axis_index(PIPE)]
            rows = jax.tree.map(lambda column: column[mine], table[kind[0]])

            def action(carry: Carry, row: Row) -> tuple[Carry, None]:
                row = row | {"position": jnp.int32(position)}
                if kind == "W":
                    return self.weight(carry, row), None
                if kind == "F":
                    carry, value = self.forward(carry, row)
                else:
                    carry, value = self.backward(carry, row, with_weights=kind == "BW")
                    carry = self.to_embedding(carry, value, row)
                return carry | {"sent": [value for _ in carry["sent"]]}, None

            carry, _ = lax.scan(action, self.start(), rows)
            # Of every buffer something is read, or the compiler would not write it.
            read = sum(jnp.float32(a.ravel()[0]) for a in jax.tree.leaves(carry))
            total, others = carry["sums"]
            return carry | {"sums": (total + read, others)}, jnp.zeros((1, 3), jnp.int32)

    return Loop
