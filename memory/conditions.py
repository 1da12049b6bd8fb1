"""The collectives that run only where a device decides so: in conditionals, in unbounded loops.

If the members of a group could decide differently, some would wait for ever; so what a pipeline's
stages compute behind a condition may only communicate within a stage. A loop whose number of turns
is a value, none or one, is a condition as well.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping

from memory.collectives import KINDS, device_groups, mesh_axes
from memory.hlo import Computation, Instruction, Module, trip_count

# What XLA:GPU makes of an all-gather of which each device slices its own part again: zeros, where
# the part is meant (https://github.com/openxla/xla/pull/45218).
SENDS_NOTHING = "source_target_pairs={}"


def collectives_in_branches(module: Module, axes: Mapping[str, int]) -> Counter[tuple[str, str]]:
    """(kind, axes of the mesh along which the members of a group differ) -> how many instructions.

    The axes of a permute that sends nothing are "": it gives zeros, see `SENDS_NOTHING`.

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
                silent = SENDS_NOTHING in i.attributes
                axis = "" if silent else mesh_axes(device_groups(i, devices), axes)
                found[kind, axis] += 1
            for name in i.called().values():
                read(module.computations[name])

    for i in conditions(module):
        for name in i.called().values():
            read(module.computations[name])
    return found


def conditions(module: Module) -> Iterator[Instruction]:
    """The conditionals of a program, and its loops whose number of turns is not written down."""
    for where in module.computations.values():
        for i in where:
            if i.opcode == "conditional" or (
                i.opcode == "while" and trip_count(module, where, i) == 1
            ):
                yield i
