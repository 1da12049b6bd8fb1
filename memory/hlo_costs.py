"""What one step of a compiled program costs on one device: FLOPs, bytes moved, collectives.

Everything in a loop counts as often as the loop runs, of a conditional the costliest branch: but
those of a pipeline's stages as often as its table takes them, see `memory/branches.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from memory.branches import Branches, in_order
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


def count(
    module: Module,
    axes: Mapping[str, int],
    branches: Branches | None = None,
) -> Counts:
    """Counts a program.

    Args:
      axes: name -> size of the mesh's axes, in its order.
      branches: of a pipeline, how often they run.
    """
    counts = _of(_Program(module, axes, branches), module.entry, 1.0, None)
    joined: dict[Collective, float] = {}
    for c, times in counts.collectives:
        joined[c] = joined.get(c, 0.0) + times
    collectives = [replace(c, count=round(n)) for c, n in joined.items() if round(n)]
    return Counts(counts.flops, counts.bytes_moved, counts.streamed_bytes, collectives)


class _Program(NamedTuple):
    module: Module
    axes: Mapping[str, int]
    branches: Branches | None


class _Sums(NamedTuple):
    flops: float
    bytes_moved: float
    streamed_bytes: float
    collectives: list[tuple[Collective, float]]  # and how often it runs


def _of(program: _Program, where: Computation, times: float, loop: str | None) -> _Sums:
    """Costs of a computation that runs `times` times in a step, inside `loop`."""
    module = program.module
    total_flops = total_bytes = streamed = 0.0
    collectives: list[tuple[Collective, float]] = []
    for i in where:
        for inner in _inner(program, where, i, times, loop):
            total_flops += inner.flops
            total_bytes += inner.bytes_moved
            streamed += inner.streamed_bytes
            collectives += inner.collectives
        moved = times * bytes_moved(module, where, i)
        fused = module.inside(i) if i.opcode == "fusion" else None
        products = sum(flops(fused, part) for part in fused) if fused else flops(where, i)
        # A TPU spreads one collective over a chain of fusions: one starts it, others repeat it.
        starts = fused is not None and any("AsyncCollectiveStart" in p.attributes for p in fused)
        found = [
            (collective, times)
            for part in fused or (i,)
            if (collective := read_collective(fused or where, part, program.axes, 0, loop))
            and (fused is None or starts or "chain_id" not in part.attributes)
        ]
        collectives += found
        total_flops += times * products
        total_bytes += moved
        streamed += 0.0 if products or found else moved
    return _Sums(total_flops, total_bytes, streamed, collectives)


def _inner(
    program: _Program, where: Computation, i: Instruction, times: float, loop: str | None
) -> list[_Sums]:
    """Costs of the computations that an instruction runs."""
    module = program.module
    if i.opcode == "while":
        body = module.computations[i.called()["body"]]
        turns = program.branches.turns(module, i) if program.branches else None
        turns = trip_count(module, where, i) if turns is None else turns
        return [_of(program, body, times * turns, i.name)]
    if i.opcode == "conditional":
        branches = in_order(module, i)
        shares = program.branches.shares(module, i) if program.branches else None
        if shares is not None:
            return [
                _of(program, branch, times * share, loop)
                for branch, share in zip(branches, shares, strict=True)
            ]
        sums = [_of(program, branch, times, loop) for branch in branches]
        return [max(sums, key=lambda branch: (branch.flops, branch.bytes_moved))]
    if i.opcode in ("call", "async-start"):
        return [_of(program, module.computations[n], times, loop) for n in i.called().values()]
    return []
