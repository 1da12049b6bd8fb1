"""What a compiled program says in its text: what is alive at its peak, costs, and time."""

from __future__ import annotations

from typing import Any

from memory.compiled import Compiled
from memory.conditions import collectives_in_branches, conditions
from memory.hlo import parse
from memory.hlo_costs import count
from memory.job import Job
from memory.liveness import Liveness, live_at_peak
from memory.roofline import branch_shares, counted_time
from parallel.targets import Target

LARGEST = 40  # buffers that are named


def counted(compiled: Compiled, job: Job, target: Target) -> dict[str, Any]:
    """Components and buffers at the peak of a training step, costs, and the roofline."""
    module = parse(compiled.text)
    counts = count(module, job.sizes, branch_shares(job, target))
    found = _peak(compiled, live_at_peak(module), "state and batch") | {
        "flops": counts.flops,
        "bytes_moved": counts.bytes_moved,
        "collectives": [vars(collective) for collective in counts.collectives],
        "conditions": len(list(conditions(module))),
        "in_branches": [
            {"kind": kind, "axis": axis, "instructions": n}
            for (kind, axis), n in sorted(collectives_in_branches(module, job.sizes).items())
        ],
    }
    return found | counted_time(job, target, counts).grade()


def held(compiled: Compiled, arguments: str) -> dict[str, Any]:
    """Components and buffers at the peak of any program.

    Args:
      arguments: what its arguments are called.
    """
    return _peak(compiled, live_at_peak(parse(compiled.text)), arguments)


def _peak(compiled: Compiled, live: Liveness, arguments: str) -> dict[str, Any]:
    # What the compiler keeps beyond what lives: gaps between buffers, and what outlives its use.
    packing = compiled.temporaries - live.peak_bytes
    return {
        "components": {arguments: compiled.arguments} | live.by_component | {"packing": packing},
        "named_fraction": live.named_fraction,
        "buffers": [
            {
                "bytes": buffer.bytes,
                "shape": str(buffer.shape),
                "component": buffer.component,
                "source": buffer.source,
            }
            for buffer in live.buffers[:LARGEST]
        ],
        "timeline": live.timeline,
    }
