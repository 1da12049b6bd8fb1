"""The front is what nothing beats; the picture has every name inside it."""

from __future__ import annotations

import sys

import matplotlib.image
import numpy as np

from compress.pareto import Point, draw, front


def drawn(count: int, seed: int) -> list[Point]:
    rng = np.random.default_rng(seed)
    return [Point(f"p{i}", *map(float, rng.integers(1, 12, 2))) for i in range(count)]


def beats(p: Point, q: Point) -> bool:
    return p.size <= q.size and p.loss <= q.loss and (p.size, p.loss) != (q.size, q.loss)


def test_the_front_is_what_no_point_beats():
    for seed in range(20):
        points = drawn(15, seed)
        wanted = {(p.size, p.loss) for p in points if not any(beats(q, p) for q in points)}
        found = front(points)
        assert {(p.size, p.loss) for p in found} == wanted
        assert len(found) == len(wanted)  # of equal ones the first
        assert [p.size for p in found] == sorted(p.size for p in found)


AXES = "bits per parameter", "bits per byte"


def test_the_picture_has_the_dense_run_in_red(tmp_path):
    file = tmp_path / "pareto.png"
    others = [Point("int8", 8.9, 1.621), Point("nf4", 5.2, 1.64), Point("int4", 5.6, 1.645)]
    assert draw(Point("dense", 32, 1.62), others, AXES, file)
    pixels = matplotlib.image.imread(file)[..., :3]
    red = np.argwhere((pixels[..., 0] > 0.8) & (pixels[..., 1] < 0.2))
    assert len(red) > 20
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert edge.min() == 1  # nothing runs out of it


def test_without_matplotlib_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw(Point("dense", 32, 1.62), [], AXES, tmp_path / "pareto.png")
    assert not list(tmp_path.iterdir())
