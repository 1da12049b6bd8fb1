"""How often each branch of a compiled pipeline runs: as often as its table is busy.

A tick of the executor (`parallel/stage.py`) has a conditional for each kind of action, and inside
those others for embedding and loss. The program's text has all branches and not which is taken; the
table says it for one stage: F, B and W run on each once for each micro-batch and chunk, embedding
and loss for each micro-batch on the stage of the first and of the last chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

from memory.hlo import Computation, Instruction, Module
from memory.tables import Table

STAGE, LAYERS = "parallel/stage.py", "parallel/chunk.py"


@dataclass(frozen=True)
class Branches:
    """The shares of one stage of a table."""

    table: Table
    stage: int

    def shares(self, module: Module, conditional: Instruction) -> list[float] | None:
        """For each branch, how often it runs when the conditional does; None outside of stages."""
        of = [f.function for f in module.stack(conditional) if f.file.endswith(STAGE)]
        if not of:
            return None
        branches = in_order(module, conditional)
        action = of[0].rpartition(".")[2]
        runs = {kind: self._runs(kind) / self.table.ticks for kind in ("F", "BW", "B", "W")}
        if action == "run_forward":
            taken = [runs["F"]]
        elif action == "run_weight":
            taken = [runs["W"]]
        elif action == "run_backward":
            both = [runs["BW"], runs["B"]]
            taken = both if len(branches) == 3 else [sum(both)]
        else:
            return self._inner(module, branches)
        return [1.0 - sum(taken), *taken]

    def _inner(self, module: Module, branches: list[Computation]) -> list[float]:
        """Of a conditional inside an action: the loss, the embedding, or all but the last chunk."""
        shares: list[float | None] = []
        for branch in branches:
            places = {(f.file, f.function) for i in all_of(module, branch) for f in module.stack(i)}
            names = {function.rpartition(".")[2] for file, function in places if STAGE in file}
            if "with_loss" in names:
                shares.append(self._has(self.table.stages * self.table.chunks - 1))
            elif "embed" in names:
                shares.append(self._has(0))
            elif any(file.endswith(LAYERS) for file, _ in places):
                shares.append(1.0 - self._has(self.table.stages * self.table.chunks - 1))
            else:
                shares.append(None)
        rest = max(0.0, 1.0 - sum(share or 0.0 for share in shares))
        # A branch that does nothing to be counted takes what is left.
        return [rest if share is None else share for share in shares]

    def _runs(self, kind: str) -> float:
        return float(self.table.runs(kind)[self.stage].sum())

    def _has(self, position: int) -> float:
        """Of this stage's chunks, the share that stands at a position."""
        chunks = range(self.table.chunks)
        return sum(self.table.position(self.stage, c) == position for c in chunks) / len(chunks)


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
