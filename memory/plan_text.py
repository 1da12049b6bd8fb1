"""A plan as a person reads it: a table by component, whether it fits, the time, what would help."""

from __future__ import annotations

from typing import Any

from memory.job import Job
from memory.plan import GIB, Row, gib
from parallel.targets import Target

GRADES = ("predicted", "compiled", "measured")
MIB = 2**20
# Components smaller than this share of the total are one line.
SMALL = 0.005


def describe(row: Row, job: Job, target: Target) -> str:
    """The whole plan."""
    batch = f"{job.batch_size} x {job.sequence_length} tokens a step"
    lines = [
        f"{target.name}: {target.device_count} devices; {row['name']}",
        f"{batch}, {_many(job.rows, 'sequence')} at a time on each device",
        "",
        *table(row),
        "",
        verdict(row),
        *_time(row, job),
        *_pipeline(row.get("pipeline")),
    ]
    if row.get("remedies"):
        lines += ["", "what would help, by itself:", *(f"  {line}" for line in row["remedies"])]
    if row.get("together"):
        lines += ["together, the least that fits:", f"  {row['together']}"]
    return "\n".join(lines)


def verdict(row: Row) -> str:
    """One line: whether the layout fits, by how much, and by which grade."""
    grade = next(g for g in reversed(GRADES[:2]) if row[g] and row[g].get("total_bytes"))
    total, limit = row[grade]["total_bytes"], row["limit_bytes"]
    if row["fits"]:
        return f"fits: {gib(total)} of {gib(limit)} GiB ({grade})"
    largest = sorted(row[grade].get("components", {}).items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"{name} {gib(size)}" for name, size in largest)
    end = f"; largest: {named}" if named else ""
    return f"does not fit: needs {gib(total)} of {gib(limit)} GiB ({grade}){end}"


def table(row: Row) -> list[str]:
    """The grades side by side by component, small ones as one."""
    grades = [g for g in GRADES if row[g]]
    parts = {g: _folded(row[g]) for g in grades}
    names = list(dict.fromkeys(name for g in grades for name in parts[g]))
    width = max(map(len, [*names, "total, GiB per device"]))
    # Three decimals of a GiB say nothing of a small model.
    unit, called = (GIB, "GiB") if row["predicted"]["total_bytes"] >= GIB / 10 else (MIB, "MiB")
    lines = [f"{called + ' per device':{width}}" + "".join(f"{g:>11}" for g in grades)]
    for name in names:
        cells = (f"{parts[g][name] / unit:11.3f}" if name in parts[g] else " " * 11 for g in grades)
        lines.append(f"{name:{width}}" + "".join(cells))
    totals = (row[g].get("total_bytes") for g in grades)
    shown = (" " * 10 + "-" if t is None else f"{t / unit:11.3f}" for t in totals)
    lines.append(f"{'total':{width}}" + "".join(shown))
    hosts = [row[g].get("host_bytes") or 0 for g in grades]
    if any(hosts):
        cells = (f"{size / unit:11.3f}" for size in hosts)
        lines.append(f"{'in host memory':{width}}" + "".join(cells))
    return lines


def _folded(grade: dict[str, Any]) -> dict[str, int]:
    """Components, the small ones as one; they add up to the total.

    A compiler may let buffers share memory that are alive together by the order of instructions.
    Then its total is less than their sum, and packing is negative.
    """
    components = grade.get("components") or {}
    total = sum(components.values())
    large = {name: size for name, size in components.items() if size >= SMALL * total}
    less = sum(size for size in components.values() if size < 0)
    rest = total - less - sum(large.values())
    shared = {"less buffers that share memory": less} if less else {}
    return large | ({"the rest, all small": rest} if rest else {}) | shared


def _time(row: Row, job: Job) -> list[str]:
    lines = []
    for name in GRADES:
        grade = row[name]
        if not grade or not grade.get("seconds"):
            continue
        tokens = job.batch_size * job.sequence_length / grade["seconds"]
        line = f"step, {name}: {_seconds(grade['seconds'])}, {tokens:,.0f} tokens/s"
        if "mfu" in grade:
            waits = [("products", grade["compute_seconds"]), ("memory", grade["memory_seconds"])]
            waits += [(f"waiting for {axis}", s) for axis, s in grade["exposed_seconds"].items()]
            waits += [("host", grade["host_seconds"]), ("bubble", grade["bubble_seconds"])]
            shares = ", ".join(f"{what} {_seconds(s)}" for what, s in waits if s > 0)
            line += f", MFU {grade['mfu']:.1%} ({shares})"
        lines.append(line)
    return lines


def _pipeline(figures: dict[str, Any] | None) -> list[str]:
    """What a pipeline's table is, what it waits for, and what it keeps."""
    if figures is None:
        return []
    chunks = "stages" if figures["chunks"] == 1 else "chunks"
    numbers = ", ".join(map(str, figures["layers"]))
    layers = f"layers of the {chunks}, in the model's order: {numbers}"
    if len(set(figures["layers"])) == 1:
        each, number = _many(figures["layers"][0], "layer"), len(figures["layers"])
        layers = f"{each} in each of {number} {chunks}"
    kept = ", ".join(f"{count} x {name}" for name, count in figures["slots"].items())
    table = f"{_many(figures['microbatches'], 'micro-batch')} in {_many(figures['ticks'], 'tick')}"
    waits, alone = (
        f"{figures[f'bubble_{way}']:.1%} of {_seconds(figures[f'seconds_{way}'])}"
        for way in ("lockstep", "ideal")
    )
    return [
        "",
        f"pipeline: {figures['schedule']}: {_many(figures['stages'], 'stage')}; {table}",
        f"  {layers}",
        f"  bubble: the stage with the most work waits {waits}, as all change ticks together",
        f"  (lockstep); it would wait {alone} if no stage waited for a tick's end (ideal)",
        f"  buffers on every stage: {kept}",
        "  memory: all stages run one program and have the same buffers; most is needed for "
        + figures["decides"],
    ]


def _many(count: int, what: str) -> str:
    """A count with its noun: 1 sequence, 2 sequences, 8 micro-batches."""
    return f"{count} {what}" + ("" if count == 1 else "es" if what.endswith("ch") else "s")


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
