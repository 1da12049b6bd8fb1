"""Which of several models is worth its size: none is smaller and better at once. And a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Where a label may stand beside its point, in points of the page; the first that is free is taken.
PLACES = tuple(
    (x, y)
    for distance in (7, 14, 24, 36)
    for x, y in (
        *((distance, distance), (distance, -distance), (-distance, distance)),
        *((-distance, -distance), (distance, 0), (0, distance), (0, -distance), (-distance, 0)),
    )
)


class Point(NamedTuple):
    """A model: its size and its loss; of both less is better."""

    name: str
    size: float
    loss: float


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats, the smallest first; of equal ones the first."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.size, p.loss)):
        if not found or point.loss < found[-1].loss:
            found.append(point)
    return found


def draw(dense: Point, others: Sequence[Point], axes: tuple[str, str], file: Path) -> bool:
    """Writes a PNG: every model, the front, the dense one marked; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullLocator, ScalarFormatter
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # measures labels
    panel = figure.add_subplot()
    best = front([dense, *others])
    panel.plot(
        [p.size for p in best], [p.loss for p in best], color="tab:blue", lw=1, label="Pareto front"
    )
    panel.plot([p.size for p in others], [p.loss for p in others], "o", color="tab:blue", ms=5)
    panel.plot(dense.size, dense.loss, "*", color="tab:red", ms=13, label="dense")
    panel.axhline(dense.loss, color="tab:red", lw=0.7, ls=":")
    panel.set_xscale("log", base=2)
    panel.set(xlabel=axes[0], ylabel=axes[1])
    panel.margins(x=0.16, y=0.12)
    low, high = panel.get_xlim()
    ticks = [t for t in (0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64) if low <= t <= high]
    if len(ticks) > 1:
        panel.set_xticks(ticks)
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_locator(NullLocator())
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="upper right")
    _label(figure, panel, sorted([dense, *others], key=lambda p: -p.loss))
    figure.savefig(file)
    return True


def _label(figure: Any, panel: Any, points: Sequence[Point]) -> None:
    """Names beside points, none over another name or point where there is room."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    renderer, inside = figure.canvas.get_renderer(), panel.get_window_extent()
    at = [panel.transData.transform((p.size, p.loss)) for p in points]
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in at]
    taken.append(panel.get_legend().get_window_extent(renderer))
    for point, own in zip(points, list(taken), strict=False):
        for number, (x, y) in enumerate(PLACES):
            note = panel.annotate(
                point.name,
                (point.size, point.loss),
                (x, y),
                textcoords="offset points",
                ha="left" if x > 0 else "right" if x < 0 else "center",
                va="bottom" if y > 0 else "top" if y < 0 else "center",
                fontsize=8,
                arrowprops=dict(arrowstyle="-", lw=0.4, color="gray") if max(x, y) > 7 else None,
            )
            box = note.get_window_extent(renderer)
            free = not any(box.overlaps(other) for other in taken if other is not own)
            whole = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0
            if (free and whole and box.y1 <= inside.y1) or number == len(PLACES) - 1:
                taken.append(box)
                break
            note.remove()
