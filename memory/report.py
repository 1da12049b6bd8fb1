"""What a sweep or a plan found, for people: a Markdown table, and a page that opens offline.

The page is `memory/page.html` with the rows put in as JSON; it draws them by itself, loads nothing
and works without a network.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from memory.plan import GIB, Row
from memory.search import seconds, total_bytes

PAGE = Path(__file__).with_name("page.html")
GRADES = ("predicted", "compiled", "measured")
# Components are many and small; drawn are these sums.
GROUPS = {
    "weights": ("weights (", "weights in", "weights before"),
    "optimizer": ("optimizer", "update"),
    "gradients": ("gradient", "summed gradients"),
    "saved activations": ("saved", "activations"),
    "loss head": ("loss head",),
    "gathered weights": ("gathered",),
    "one layer": ("one layer", "hidden states", "attention", "feed-forward", "embedding"),
}


def markdown(rows: Iterable[Row]) -> str:
    """A table, the fastest first; layouts that failed come last, with their reason."""
    done = sorted((row for row in rows if row["predicted"]), key=seconds)
    names = "layout, fits, predicted GiB, compiled GiB, error, measured GiB, step, MFU"
    columns = [*names.split(", "), "waiting for links", "largest"]
    lines = [f"| {' | '.join(columns)} |", "| --- |" + " --- |" * (len(columns) - 1)]
    for row in done:
        predicted, compiled, measured = (row[grade] or {} for grade in GRADES)
        grade = predicted
        error = ""
        if compiled.get("total_bytes"):
            error = f"{100 * (predicted['total_bytes'] / compiled['total_bytes'] - 1):+.1f}%"
        largest = max(grade["components"], key=lambda name: grade["components"][name])
        waiting = sum(grade["exposed_seconds"].values()) / grade["seconds"]
        lines.append(
            f"| {row['name']} | {'yes' if row['fits'] else 'no'} | {_gib(predicted)} | "
            f"{_gib(compiled)} | {error} | {_gib(measured)} | {1e3 * seconds(row):,.1f} ms | "
            f"{grade['mfu']:.1%} | {waiting:.0%} | {largest} |"
        )
    for row in rows:
        if not row["predicted"]:
            lines.append(f"| {row['name']} | failed: {row['error']} |" + " |" * 8)
    return "\n".join(lines) + "\n"


def _gib(grade: dict[str, Any]) -> str:
    size = grade.get("total_bytes")
    return f"{size / GIB:.2f}" if size else ""


def html(rows: Sequence[Row], *, title: str, limit_bytes: int) -> str:
    """The page of a sweep: sortable table, bars by component, time against memory, collectives."""
    return _page(title, limit_bytes, layouts=[_drawn(row) for row in rows], plan=None)


def plan_html(row: Row, timeline: Sequence[Any], buffers: Sequence[Any]) -> str:
    """The page of one plan: its grades side by side, memory over the step, the largest buffers.

    Args:
      row: of `memory.plan`.
      timeline: (position in the step from 0 to 1, {component: bytes}), of the compiled program.
      buffers: {"bytes", "shape", "component", "source"} of the largest ones.
    """
    moments = [
        {"at": at, "parts": {name: size / GIB for name, size in parts.items()}}
        for at, parts in timeline
    ]
    plan = {"timeline": moments, "buffers": list(buffers)[:40]}
    grades = []
    for grade in GRADES:
        if row[grade] and row[grade].get("components"):
            as_row = row | {"name": grade, "predicted": row["predicted"] | row[grade]}
            grades.append(_drawn(as_row | {"compiled": None, "measured": None}))
    return _page(f"{row['name']} on {row['target']}", row["limit_bytes"], grades, plan)


def _drawn(row: Row) -> dict[str, Any]:
    """What the page needs of a row."""
    if not row["predicted"]:
        return {"name": row["name"], "fits": False, "error": row["error"], "parts": {}}
    grade = row["predicted"]
    parts: dict[str, float] = {}
    for name, size in (grade.get("components") or {}).items():
        group = next((g for g, starts in GROUPS.items() if name.startswith(starts)), "other")
        parts[group] = parts.get(group, 0.0) + size / GIB
    sizes = {g: (row[g] or {}).get("total_bytes") for g in GRADES}
    return {
        "name": row["name"],
        "fits": row["fits"],
        "error": row["error"],
        "gib": total_bytes(row) / GIB,
        "sizes": {g: size / GIB for g, size in sizes.items() if size},
        "ms": 1e3 * seconds(row),
        "mfu": grade["mfu"],
        "parts": parts,
        "links": {axis: 1e3 * s for axis, s in grade["communication_seconds"].items()},
    }


def _page(
    title: str, limit_bytes: int, layouts: list[dict[str, Any]], plan: dict[str, Any] | None
) -> str:
    data = {"title": title, "limit": limit_bytes / GIB, "layouts": layouts, "plan": plan}
    # "</script>" in a name would end the script that holds it.
    text = json.dumps(data).replace("<", "\\u003c")
    return PAGE.read_text().replace("/*DATA*/", text)
