"""How often the parts of a compiled pipeline's tick run: as often as its table is busy.

A tick of the executor (`parallel/stage.py`) has a conditional for each kind of action, or a loop of
one turn or none (`parallel/when.py`), and inside those others for embedding and loss. The program's
text does not say which are taken; the table does, for one stage: F, B and W run once for each
micro-batch and chunk, embedding and loss for each micro-batch of the first and of the last chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

from memory.hlo import Computation, Instruction, Module
from memory.tables import Table

STAGE, WHEN, LAYERS = "parallel/stage.py", "parallel/when.py", "parallel/chunk.py"
MODEL = "parallel/cut.py"
GROUPED = "parallel/grouped.py"  # blocks of experts' rows, which no table knows of


@dataclass(frozen=True)
class Branches:
    """What one stage does.

    Attributes:
      table: of the pipeline.
      stage: which is counted.
      units: turns of the loop over layers, of each chunk in the model's order.
    """

    table: Table
    stage: int
    units: tuple[float, ...]

    def turns(self, module: Module, loop: Instruction) -> float | None:
        """How often the body of a loop runs, where the table says; else None."""
        frames = module.stack(loop)
        if frames and frames[0].file.endswith(WHEN):
            body = module.computations[loop.called()["body"]]
            return self._taken(module, loop, body)
        if frames and frames[0].file.endswith(LAYERS) and len(set(self.units)) > 1:
            chunks = range(self.table.chunks)
            return sum(self.units[self.table.position(self.stage, c)] for c in chunks) / len(chunks)
        return None

    def shares(self, module: Module, conditional: Instruction) -> list[float] | None:
        """For each branch, how often it runs when the conditional does; None outside of stages."""
        frames = module.stack(conditional)
        if not any(f.file.endswith(STAGE) for f in frames) or frames[0].file.endswith(GROUPED):
            return None
        taken = [self._taken(module, conditional, b) for b in in_order(module, conditional)]
        # A branch with nothing to be counted takes what is left.
        rest = max(0.0, 1.0 - sum(share or 0.0 for share in taken))
        return [rest if share is None else share for share in taken]

    def _taken(self, module: Module, i: Instruction, branch: Computation) -> float | None:
        """How often a branch runs when its conditional does; None for one that does nothing."""
        last = self.table.stages * self.table.chunks - 1
        of = next((f.function for f in module.stack(i) if f.file.endswith(STAGE)), "")
        frames = [f for inner in all_of(module, branch) for f in module.stack(inner)]
        parts = {_name(f.function) for f in frames if f.file.endswith(LAYERS)}
        names = {_name(f.function) for f in frames if f.file.endswith((STAGE, MODEL))}
        kind = {"run_forward": "F", "run_weight": "W"}.get(_name(of))
        if _name(of) == "run_backward":
            kind = "B" if "input_grad" in parts else "BW"
        if kind is not None:
            runs = float(self.table.runs(kind)[self.stage].sum()) / self.table.ticks
            return runs if parts else None
        if "with_loss" in names:
            return self._has(last)
        if "embed" in names:
            return self._has(0)
        return 1.0 - self._has(last) if parts else None

    def _has(self, position: int) -> float:
        """Of this stage's chunks, the share that stands at a position."""
        chunks = range(self.table.chunks)
        return sum(self.table.position(self.stage, c) == position for c in chunks) / len(chunks)


def _name(function: str) -> str:
    return function.rpartition(".")[2]


def in_order(module: Module, conditional: Instruction) -> list[Computation]:
    """The branches by their number; of a predicate, what is done where it is false first."""
    roles = conditional.called()
    names = [roles[role] for role in sorted(roles, key=lambda r: (r != "false_computation", r))]
    return [module.computations[name] for name in names]


def all_of(module: Module, where: Computation) -> list[Instruction]:
    """The instructions of a computation and of what it runs."""
    found = []
    for i in where:
        found.append(i)
        if i.opcode in ("while", "conditional", "call"):
            for name in i.called().values():
                found += all_of(module, module.computations[name])
    return found
