"""Drawings of pipeline schedules: what every stage does, over time, as text, SVG, HTML and PNG.

Commands: python -m memory.timeline --stages=4 --microbatches=8 --out=docs/pipeline [--png]
          python -m memory.timeline --schedule=zb_v --stages=4 --microbatches=6
          python -m memory.timeline --bubbles 4x8 4x16 8x24 8x64

Writes NAME.svg (with --png NAME.png, which wants the dev extra) for every schedule and form, for
one --schedule, or for the --orders of a file; prints each as text and the table of all figures. A
drawing has two panels with one scale of time: lockstep, the ticks of one program, and ideal, the
stages by themselves; see `parallel/schedule_costs.py`. Costs are units of F = B = W.
"""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from parallel.schedule import Action, Schedule
from parallel.schedule_costs import UNIT, Costs, Span, Timing, ideal, lockstep
from parallel.schedule_file import read_schedule
from parallel.schedule_kinds import FORMS, make_schedule
from parallel.schedule_slots import in_flight, slots

Lines = Iterable[str]
# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/); later chunks are paler.
COLOURS = {"F": "#56B4E9", "B": "#E69F00", "W": "#009E73"}
MEANING = {"F": "forward", "B": "gradient by input", "W": "gradient by weights"}
PANELS = (("lockstep", lockstep), ("ideal", ideal))
WIDTH, LEFT, ROW, GAP, HEAD = 960, 56, 20, 4, 26  # pixels
STYLE = """<style>
.schedule text { font: 11px system-ui, sans-serif; fill: currentColor }
.schedule .on text { font-size: 10px; fill: #000; text-anchor: middle }
.schedule .name { font-weight: bold }
</style>"""
HATCH = """<defs>
<pattern id="ID" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
<rect width="6" height="6" fill="#808080" fill-opacity=".12"/>
<path d="M0 0v6" stroke="#808080" stroke-opacity=".45"/>
</pattern>
</defs>"""


def text(schedule: Schedule) -> str:
    """Stages as rows, ticks as columns; `F3.1` is the forward of micro-batch 3, chunk 1."""
    columns = [[_cell(schedule, cell) for cell in row] for row in schedule.ticks]
    widths = [max(map(len, column)) for column in columns]
    lines = [f"{_title(schedule)}; {len(schedule.ticks)} ticks"]
    for stage in range(schedule.stages):
        cells = (column[stage].ljust(w) for column, w in zip(columns, widths, strict=True))
        lines.append(f"stage {stage} |" + "|".join(cells) + "|")
    return "\n".join(lines) + "\n"


def figures(schedules: Iterable[Schedule], costs: Costs = UNIT) -> str:
    """A Markdown table: bubbles in both simulations, micro-batches in flight and slots by stage.

    "gaps" is the longest idle time of a stage between its first and its last action, in ideal.
    """
    names = ["schedule", "ticks", "ideal", "gaps", "lockstep", "F to B", "F to W", "residual slots"]
    lines = [f"| {' | '.join(names)} |", "| --- |" + " --- |" * (len(names) - 1)]
    for schedule in schedules:
        alone, ticks = ideal(schedule, costs), lockstep(schedule, costs)
        row = [
            *(schedule.name, str(len(schedule.ticks)), f"{alone.bubble:g}"),
            *(f"{max(alone.gaps):g}", f"{ticks.bubble:g}"),
            *(_list(in_flight(schedule, "B")), _list(ticks.in_flight)),
            _list(slots(schedule).counts["residual"]),
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def bubbles(sizes: Sequence[tuple[int, int]], costs: Costs = UNIT) -> str:
    """A Markdown table for several (stages, micro-batches): bubbles in ideal and in lockstep.

    In parentheses the most micro-batches that a stage has in flight, from F to W.
    """
    head = "".join(f" p {p}, m {m} |" for p, m in sizes)
    lines = [f"| schedule |{head}", "| --- |" + " --- |" * len(sizes)]
    for name, forms in FORMS.items():
        for form in forms:
            made = [make_schedule(name, p, m, form=form) for p, m in sizes]
            cells = [
                f"{alone.bubble:g}, {ticks.bubble:g} ({max(ticks.in_flight):g})"
                for alone, ticks in ((ideal(s, costs), lockstep(s, costs)) for s in made)
            ]
            lines.append(f"| {made[0].name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def svg(schedule: Schedule, costs: Costs = UNIT) -> str:
    """The drawing as a file of its own, on white."""
    return _drawn(schedule, costs, alone=True)


def fragment(schedule: Schedule, costs: Costs = UNIT) -> str:
    """The drawing as an `<svg>` to be put into a page, whose text colour it takes."""
    return _drawn(schedule, costs, alone=False)


def _for_png() -> tuple[Any, Any]:
    """The classes that draw one: matplotlib is in the dev extra."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a PNG wants matplotlib; run pip install -e '.[dev]', or take the SVG",
            name=error.name,
        ) from error
    return Figure, Patch


def png(schedule: Schedule, path: Path, costs: Costs = UNIT) -> None:
    """Writes the drawing as PNG.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
    """
    Figure, Patch = _for_png()
    timings = [(which, run(schedule, costs)) for which, run in PANELS]
    width = max(timing.time for _, timing in timings)
    back: dict[str, Any] = dict(color="#EEEEEE", edgecolor="#CCCCCC", hatch="///", linewidth=0)
    number: dict[str, Any] = dict(ha="center", va="center", fontsize=6)
    figure = Figure(figsize=(10, 1.3 + 2 * (0.3 + 0.22 * schedule.stages)), layout="constrained")
    figure.suptitle(_title(schedule), fontsize=10)
    for axes, (which, timing) in zip(figure.subplots(2, 1), timings, strict=True):
        axes.set_title(_caption(which, timing), fontsize=8, loc="left")
        axes.set(xlim=(0, width), ylim=(schedule.stages - 0.5, -0.5))
        axes.set_yticks(range(schedule.stages), [f"stage {s}" for s in range(schedule.stages)])
        axes.tick_params(labelsize=7)
        axes.barh(range(schedule.stages), timing.time, 0.9, **back)
        for span in timing.spans:
            length, colour = span.end - span.start, _colour(span.action, schedule.chunks)
            axes.barh(span.stage, length, 0.9, left=span.start, color=colour, edgecolor="white")
            if _roomy(span, 800 / width):
                middle = (span.start + span.end) / 2
                axes.text(middle, span.stage, str(span.action.microbatch), **number)
        for tick in timing.ticks:
            axes.axvline(tick, color="black", alpha=0.35, linewidth=0.7)
    legend = [Patch(color=COLOURS[kind], label=f"{kind}, {MEANING[kind]}") for kind in COLOURS]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    figure.savefig(path, dpi=130)


def _drawn(schedule: Schedule, costs: Costs, *, alone: bool) -> str:
    timings = [(which, run(schedule, costs)) for which, run in PANELS]
    scale = (WIDTH - LEFT - 8) / max(timing.time for _, timing in timings)
    tall = HEAD + schedule.stages * (ROW + GAP)
    height = 24 + len(timings) * tall + HEAD
    name = html.escape(_title(schedule), quote=True)
    idle = "idle-" + "".join(c if c.isalnum() else "-" for c in schedule.name)
    box = f'class="schedule" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}"'
    if alone:
        box += f' xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" color="#1b1f24"'
    parts = [f"<svg {box}>", STYLE, HATCH.replace("ID", idle)]
    if alone:
        parts.append(f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>')
    parts.append(f'<text class="name" x="4" y="15">{name}</text>')
    for i, (which, timing) in enumerate(timings):
        top = 24 + i * tall
        parts.append(f'<text x="4" y="{top + 16}">{_caption(which, timing)}</text>')
        parts += _panel(schedule, timing, idle, top + HEAD, scale)
    return "\n".join([*parts, *_legend(schedule, idle, height - 8), "</svg>\n"])


def _panel(schedule: Schedule, timing: Timing, idle: str, top: float, scale: float) -> Lines:
    """One simulation: what is idle, a path for the boxes of each colour, and their numbers."""
    for stage in range(schedule.stages):
        y, all_time = top + stage * (ROW + GAP), _n(timing.time * scale)
        yield f'<text x="4" y="{y + 14}">stage {stage}</text>'
        yield f'<rect x="{LEFT}" y="{y}" width="{all_time}" height="{ROW}" fill="url(#{idle})"/>'
    boxes: dict[str, str] = {}
    numbers = ""
    for span in timing.spans:
        x, y = LEFT + span.start * scale, top + span.stage * (ROW + GAP)
        width = (span.end - span.start) * scale
        boxes.setdefault(colour := _colour(span.action, schedule.chunks), "")
        boxes[colour] += f"M{_n(x + 0.5)} {y}h{_n(width - 1)}v{ROW}h{_n(1 - width)}z"
        if _roomy(span, scale):
            place = f'x="{_n(x + width / 2)}" y="{y + 14}"'
            numbers += f"<text {place}>{span.action.microbatch}</text>"
    yield from (f'<path fill="{colour}" d="{d}"/>' for colour, d in boxes.items())
    bottom = top + schedule.stages * (ROW + GAP) - GAP
    lines = "".join(f"M{_n(LEFT + x * scale)} {top - 3}V{bottom + 3}" for x in timing.ticks)
    yield f'<path d="{lines}" stroke="currentColor" stroke-opacity=".35" fill="none"/>'
    yield f'<g class="on">{numbers}</g>'


def _legend(schedule: Schedule, idle: str, y: float) -> Lines:
    swatch = f'y="{y - 10}" width="12" height="12" fill='
    x = LEFT
    for kind, meaning in MEANING.items():
        for chunk in range(schedule.chunks):
            colour = _colour(Action(kind, 0, chunk), schedule.chunks)
            yield f'<rect x="{x}" {swatch}"{colour}"/>'
            x += 14
        yield f'<text x="{x + 2}" y="{y}">{kind}, {meaning}</text>'
        x += 150
    note = f"; chunks 0 to {schedule.chunks - 1}, dark to pale" * (schedule.chunks > 1)
    yield f'<rect x="{x}" {swatch}"url(#{idle})"/><text x="{x + 16}" y="{y}">idle{note}</text>'


def _title(schedule: Schedule) -> str:
    return (
        f"{schedule.name}: {schedule.stages} stages, {schedule.microbatches} micro-batches, "
        f"up to {_list(in_flight(schedule))} of them in flight"
    )


def _caption(which: str, timing: Timing) -> str:
    number = f" in {len(timing.ticks)} ticks" if timing.ticks else ""
    return (
        f"{which}: {timing.time:g} units{number}, {timing.bubble:g} of them bubble "
        f"({timing.bubble_fraction:.0%} of all stages' time is idle); "
        f"between its first and last action a stage is idle for up to {max(timing.gaps):g}"
    )


def _cell(schedule: Schedule, cell: Sequence[Action]) -> str:
    chunks = schedule.chunks > 1
    return " ".join(f"{a.kind}{a.microbatch}" + f".{a.chunk}" * chunks for a in cell)


def _colour(action: Action, chunks: int) -> str:
    pale = 0.6 * action.chunk / max(1, chunks - 1)
    mixed = (int(COLOURS[action.kind][i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + pale * (255 - part)):02X}" for part in mixed)


def _roomy(span: Span, scale: float) -> bool:
    """Whether the number of a micro-batch fits into its box."""
    return (span.end - span.start) * scale > 6 * len(str(span.action.microbatch)) + 1


def _list(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _n(pixels: float) -> str:
    return f"{pixels:.1f}".removesuffix(".0")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command above."""
    parser = argparse.ArgumentParser(
        prog="python -m memory.timeline", description="Timelines of all pipeline schedules."
    )
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--chunks", type=int, help="of a stage, in the interleaved schedule")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--schedule", choices=FORMS, help="this one alone, in all its forms")
    which.add_argument("--orders", help="the one of this file, as config.pipeline.orders")
    parser.add_argument("--out", type=Path, help="folder for the drawings; none: text only")
    parser.add_argument("--png", action="store_true", help="PNG files beside the SVG ones")
    parser.add_argument("--bubbles", nargs="+", metavar="PxM", help="one table for these p and m")
    flags = parser.parse_args(arguments)
    if flags.bubbles:
        try:
            sizes = [(int(p), int(m)) for p, m in (size.split("x") for size in flags.bubbles)]
        except ValueError:
            parser.error(f"--bubbles={' '.join(flags.bubbles)}: write 4x8 for p 4 and m 8")
        print(bubbles(sizes), end="")
        return
    if flags.png and not flags.out:
        parser.error("--png wants --out=FOLDER")
    try:
        if flags.png:
            _for_png()  # refused before anything is written
        for name, schedule in (made := _made(flags)).items():
            print(text(schedule))
            if flags.out:
                flags.out.mkdir(parents=True, exist_ok=True)
                (flags.out / f"{name}.svg").write_text(svg(schedule))
            if flags.png:
                png(schedule, flags.out / f"{name}.png")
    except (ModuleNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(figures(made.values()), end="")


def _made(flags: argparse.Namespace) -> dict[str, Schedule]:
    """The schedules that are asked for by the name of their drawing; a line for each left out."""
    p, m = flags.stages, flags.microbatches
    if flags.orders:
        return {Path(flags.orders).stem: read_schedule(flags.orders, p, m)}
    made: dict[str, Schedule] = {}
    for name in [flags.schedule] if flags.schedule else FORMS:
        chunks, several = flags.chunks if name == "interleaved" else None, len(FORMS[name]) > 1
        try:
            for form in FORMS[name]:
                file = f"{name}_{form}" if several else name
                made[file] = make_schedule(name, p, m, chunks, form)
        except ValueError as error:  # whatever the form
            if flags.schedule or p < 1 or m < 1:
                raise
            print(f"left out: {error}\n")
    return made


if __name__ == "__main__":
    main()
