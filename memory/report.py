"""What a sweep or a plan found, for people: a Markdown table, and a page that opens offline.

The page is `memory/page.html` with the rows put in as JSON; it draws them by itself, loads nothing
and works without a network.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memory.plan import Row, gib
from memory.plan_text import verdict
from memory.search import seconds

PAGE = Path(__file__).with_name("page.html")
GRADES = ("predicted", "compiled", "measured")
Sizes = dict[str, float]  # component -> bytes

# Drawn name -> colour, and how the components in it begin; the first that matches, stacked in this
# order. A name has one colour in every picture. Any two differ by more than 0.1 in OKLab, as seen
# with protan, deutan and tritan eyes, too (Machado et al. 2009,
# https://doi.org/10.1109/TVCG.2009.113), and all stand out from a white and from a dark page.
DRAWN = {
    "state and batch": ("#3B3AAF", ("state and batch",)),
    "weights": ("#3573AD", ("weights (",)),
    "optimizer state": ("#75C6FF", ("optimizer: ",)),
    "weights in compute dtype": ("#8608F9", ("weights in", "weights before")),
    "gathered weights": ("#C074EB", ("gathered weights",)),
    "activations": ("#AFE2B7", ("saved: ", "activations", "pipeline buffers", "computed again")),
    "gradients": ("#F9CF11", ("gradient", "summed gradients")),
    "attention": ("#D77703", ("attention", "one layer: attention")),
    "feed-forward": ("#684018", ("feed-forward", "one layer: feed-forward")),
    "residual stream": ("#EF9F5E", ("one layer: residual", "hidden states", "embedding", "sent")),
    "loss head": ("#816500", ("loss head",)),
    "update": ("#A1016A", ("update", "optimizer")),
    "packing": ("#B1B1B2", ("packing",)),
    "other": ("#808783", ("",)),
}
STATE = ("state and batch", "weights", "optimizer state")
# Parts below this share of every bar are drawn as "other": they would only lengthen the legend.
SMALL = 0.005

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), then some for axes joined in a group.
AXES = {
    "data": "#E69F00",
    "fsdp": "#0072B2",
    "tensor": "#009E73",
    "pipe": "#CC79A7",
    "context": "#56B4E9",
    "expert": "#D55E00",
}
JOINED = ("#882255", "#999933", "#F0E442", "#7F7F7F")


def markdown(rows: Iterable[Row]) -> str:
    """A table, the fastest first; layouts that failed come last, with their reason."""
    rows = list(rows)
    done = sorted((row for row in rows if row["predicted"]), key=seconds)
    names = "layout, fits, predicted GiB, compiled GiB, error, measured GiB, step, MFU"
    columns = [*names.split(", "), "waiting for links", "largest"]
    lines = [f"| {' | '.join(columns)} |", "| --- |" + " --- |" * (len(columns) - 1)]
    for row in done:
        predicted, compiled, measured = (row[grade] or {} for grade in GRADES)
        error = ""
        if compiled.get("total_bytes"):
            error = f"{100 * (predicted['total_bytes'] / compiled['total_bytes'] - 1):+.1f}%"
        parts, timed = _parts(_sized(row)), _timed(row)
        waiting = sum(timed["exposed_seconds"].values()) / timed["seconds"]
        lines.append(
            f"| {_cell(row['name'])} | {_fits(row)} | {_gib(predicted)} | "
            f"{_gib(compiled)} | {error} | {_gib(measured)} | {1e3 * seconds(row):,.1f} ms | "
            f"{_mfu(row):.1%} | {waiting:.0%} | {max(parts, key=lambda name: parts[name])} |"
        )
    for row in rows:
        if not row["predicted"]:
            lines.append(f"| {_cell(row['name'])} | failed: {_cell(row['error'])} |" + " |" * 8)
    return "\n".join(lines) + "\n"


def html(rows: Sequence[Row], *, title: str, limit_bytes: int) -> str:
    """The page of a sweep: sortable table, bars by component, time against memory, collectives."""
    return _page(title, "", limit_bytes, [_drawn(row) for row in rows], plan=None)


def plan_html(row: Row, timeline: Sequence[Any], buffers: Sequence[Any], schedule: str = "") -> str:
    """The page of one plan: its grades side by side, memory over the step, the largest buffers.

    Args:
      row: of `memory.plan`.
      timeline: (position in the step from 0 to 1, {component: bytes}), of the temporaries of the
        compiled program.
      buffers: {"bytes", "shape", "component", "source"} of the largest ones.
      schedule: the drawing of a pipeline's timeline, an `<svg>`, or why there is none.
    """
    grades = [
        {"name": name} | _bar(row[name], row[name])
        for name in GRADES
        if row[name] and row[name].get("total_bytes")
    ]
    moments = []
    if timeline:
        stacks = _filled(
            row["compiled"]["total_bytes"],
            {"state and batch": row["compiled"]["arguments"]},
            [_grouped(parts) for _, parts in timeline],
        )
        moments = [
            {"at": at, "parts": parts}
            for (at, _), parts in zip(timeline, _folded(stacks), strict=True)
        ]
    plan = {"timeline": moments, "buffers": list(buffers)[:40], "schedule": schedule}
    title = f"{row['name']} on {row['target']}"
    return _page(title, verdict(row), row["limit_bytes"], grades, plan)


def _drawn(row: Row) -> dict[str, Any]:
    """What the page needs of a row."""
    drawn = {"name": row["name"], "fits": _fits(row), "error": row["error"], "parts": {}}
    if not row["predicted"]:
        return drawn
    sizes = {grade: (row[grade] or {}).get("total_bytes") for grade in GRADES}
    return (
        drawn
        | _bar(_sized(row), _timed(row))
        | {
            "sizes": {grade: size for grade, size in sizes.items() if size},
            "ms": 1e3 * seconds(row),
            "mfu": _mfu(row),
        }
    )


def _bar(sized: Mapping[str, Any], timed: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the pictures: bytes by component, and milliseconds by mesh axis."""
    links = timed.get("communication_seconds") or {}
    return {
        "bytes": sized["total_bytes"],
        "parts": _parts(sized),
        "links": {axis: 1e3 * time for axis, time in links.items()},
    }


def _parts(grade: Mapping[str, Any]) -> Sizes:
    """Drawn name -> bytes of a grade; they add up to its total."""
    total = grade["total_bytes"]
    if not grade.get("components"):  # the compiler refused it, or it was only run
        state = grade.get("arguments") or grade.get("state_bytes") or 0
        return {"state and batch": state, "other": total - state}
    parts = _grouped(grade["components"])
    state = {name: parts.pop(name) for name in STATE if name in parts}
    parts.pop("packing", None)
    return _filled(total, state, [parts])[0]


def _filled(total: float, state: Sizes, moments: Sequence[Sizes]) -> list[Sizes]:
    """Temporaries with what is beside them, so that the fullest moment is the total.

    What lies between buffers is packing. Where the compiler's total is less than what seems to be
    alive (it lets more of them share memory), temporaries are drawn smaller by one factor.
    """
    peak = max(sum(parts.values()) for parts in moments)
    rest = total - sum(state.values())
    share = min(1.0, rest / peak) if peak else 1.0
    return [
        state
        | {name: size * share for name, size in parts.items()}
        | {"packing": max(0.0, rest - peak)}
        for parts in moments
    ]


def _grouped(components: Mapping[str, float]) -> Sizes:
    """Components, many and small, summed by the names that are drawn."""
    parts: Sizes = {}
    for component, size in components.items():
        name = next(name for name, (_, starts) in DRAWN.items() if component.startswith(starts))
        parts[name] = parts.get(name, 0.0) + size
    return parts


def _folded(stacks: Sequence[Sizes]) -> list[Sizes]:
    """The same without the names that are small in every one: they are in "other"."""
    seen = {
        name
        for parts in stacks
        for name, size in parts.items()
        if size >= SMALL * sum(parts.values())
    }
    folded = []
    for parts in stacks:
        kept = {name: size for name, size in parts.items() if name in seen and name != "other"}
        rest = sum(size for name, size in parts.items() if name not in kept)
        folded.append(kept | ({"other": rest} if rest else {}))
    return folded


def _sized(row: Row) -> dict[str, Any]:
    """The grade of `memory.search.total_bytes`."""
    grade: dict[str, Any] = row["compiled"] or row["predicted"]
    return grade


def _timed(row: Row) -> dict[str, Any]:
    """The grade whose roofline is drawn: the compiled program's, where it was counted."""
    compiled: dict[str, Any] = row["compiled"] or {}
    grade: dict[str, Any] = compiled if "mfu" in compiled else row["predicted"]
    return grade


def _mfu(row: Row) -> float:
    """Of the step time that is shown, which may be measured."""
    timed = _timed(row)
    return float(timed["mfu"] * timed["seconds"] / seconds(row))


def _fits(row: Row) -> str:
    if row["status"] == "failed":
        return "failed"
    return "yes" if row["fits"] else "no"


def _cell(text: str) -> str:
    """Text that ends neither a cell nor a line of a table."""
    return " ".join(text.replace("|", "\\|").split())


def _gib(grade: dict[str, Any]) -> str:
    size = grade.get("total_bytes")
    return gib(size) if size else ""


def _page(
    title: str,
    note: str,
    limit_bytes: int,
    layouts: list[dict[str, Any]],
    plan: dict[str, Any] | None,
) -> str:
    for layout, parts in zip(layouts, _folded([one["parts"] for one in layouts]), strict=True):
        layout["parts"] = parts
    joined = sorted({axis for layout in layouts for axis in layout.get("links", ())} - set(AXES))
    axes = AXES | {axis: JOINED[i % len(JOINED)] for i, axis in enumerate(joined)}
    data = {
        "title": title,
        "note": note,
        "limit": limit_bytes,
        "components": {name: colour for name, (colour, _) in DRAWN.items()},
        "axes": axes,
        "layouts": layouts,
        "plan": plan,
    }
    # "</script>" in a name would end the script that holds it.
    text = json.dumps(data).replace("<", "\\u003c")
    return PAGE.read_text().replace("/*DATA*/", text)
