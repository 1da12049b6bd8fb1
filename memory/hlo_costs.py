"""What one step of a compiled program costs on one device: FLOPs, bytes moved, collectives.

Everything in a loop counts as often as the loop runs, of a conditional the costliest branch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from memory.collectives import Collective, read_collective
from memory.hlo import Computation, Instruction, Module, trip_count
from memory.hlo_bytes import bytes_moved
from memory.hlo_flops import flops


@dataclass(frozen=True)
class Counts:
    """Costs of one step, per device.

    Attributes:
      flops: of contractions and attention kernels, a multiplication and an addition being two; of
        a causal kernel, the half it does. Elementwise work is left out.
      bytes_moved: between the device's memory and its cores, if every fusion reads its operands
        and writes its results once.
      streamed_bytes: of these, what instructions move that are no product and no collective.
      collectives: equal ones at one place joined.
    """

    flops: float
    bytes_moved: float
    streamed_bytes: float
    collectives: list[Collective]


def count(module: Module, axes: Mapping[str, int]) -> Counts:
    """Counts a program.

    Args:
      axes: name -> size of the mesh's axes, in its order.
    """
    counts = _of(module, module.entry, axes, 1, None)
    joined: Counter[Collective] = Counter()
    for c in counts.collectives:
        joined[replace(c, count=0)] += c.count
    counts.collectives[:] = [replace(c, count=n) for c, n in joined.items()]
    return counts


def _of(
    module: Module, where: Computation, axes: Mapping[str, int], times: int, loop: str | None
) -> Counts:
    """Costs of a computation that runs `times` times in a step, inside `loop`."""
    total_flops = total_bytes = streamed = 0.0
    collectives: list[Collective] = []
    for i in where:
        inner = [
            _of(module, module.computations[name], axes, times * n, within)
            for name, n, within in _run_by(module, where, i, loop)
        ]
        if i.opcode == "conditional":
            inner = [max(inner, key=lambda branch: (branch.flops, branch.bytes_moved))]
        for counts in inner:
            total_flops += counts.flops
            total_bytes += counts.bytes_moved
            streamed += counts.streamed_bytes
            collectives += counts.collectives
        moved = times * bytes_moved(module, where, i)
        fused = module.inside(i) if i.opcode == "fusion" else None
        products = sum(flops(fused, part) for part in fused) if fused else flops(where, i)
        # A TPU spreads one collective over a chain of fusions: one starts it, others repeat it.
        starts = fused is not None and any("AsyncCollectiveStart" in p.attributes for p in fused)
        found = [
            collective
            for part in fused or (i,)
            if (collective := read_collective(fused or where, part, axes, times, loop))
            and (fused is None or starts or "chain_id" not in part.attributes)
        ]
        collectives += found
        total_flops += times * products
        total_bytes += moved
        streamed += 0.0 if products or found else moved
    return Counts(total_flops, total_bytes, streamed, collectives)


def _run_by(
    module: Module, where: Computation, i: Instruction, loop: str | None
) -> list[tuple[str, int, str | None]]:
    """The computations that an instruction runs, how often, and inside which loop."""
    if i.opcode not in ("while", "conditional", "call", "async-start"):
        return []
    roles = i.called()
    if i.opcode == "while":
        return [(roles["body"], trip_count(module, where, i), i.name)]
    return [(name, 1, loop) for name in roles.values()]
