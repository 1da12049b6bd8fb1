"""The collectives that run only where a branch of a conditional is taken.

Devices decide by themselves which branch they take. If the members of a group could decide
differently, some would wait for ever; so what a pipeline's stages compute behind a condition may
only communicate within a stage.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from memory.collectives import KINDS, device_groups, mesh_axes
from memory.hlo import Computation, Module


def collectives_in_branches(module: Module, axes: Mapping[str, int]) -> Counter[tuple[str, str]]:
    """(kind, axes of the mesh along which the members of a group differ) -> how many instructions.

    Args:
      axes: name -> size of the mesh's axes, in its order.
    """
    devices = math.prod(axes.values())
    found: Counter[tuple[str, str]] = Counter()
    seen: set[str] = set()

    def read(where: Computation) -> None:
        """All that `where` runs."""
        if where.name in seen:
            return
        seen.add(where.name)
        for i in where:
            kind = i.opcode.removesuffix("-start")
            if kind in KINDS:
                found[kind, mesh_axes(device_groups(i, devices), axes)] += 1
            for name in i.called().values():
                read(module.computations[name])

    for computation in module.computations.values():
        for i in computation:
            if i.opcode == "conditional":
                for name in i.called().values():
                    read(module.computations[name])
    return found


def conditionals(module: Module) -> int:
    """How many conditionals a program has."""
    return sum(i.opcode == "conditional" for where in module.computations.values() for i in where)
