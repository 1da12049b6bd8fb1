"""Leaks of arrays: what is alive after every step, by shape, dtype, sharding and line of code.

An array remembers the stack that made it (`jax.Array.traceback`), so a census of all live arrays
costs about a microsecond each, and arrays that become more and more are named with file and line.
"""

from __future__ import annotations

import gc
import math
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax

# Arrays leak where the least count of a window is above that of the window before, WINDOW - 1 times
# in a row, by STEADY or more, and never by less than half as much as at best. Windows are WINDOW
# steps long, and WINDOW times as long, and so on: one array a step is found within 16 steps, one
# in fifty steps within 1024. What goes up and down, or fills up with a few, is no leak.
WINDOW = 4
STEADY = 2

# Frames of libraries do not tell whose the array is.
LIBRARIES = (
    *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")},
    str(Path(jax.__file__).parents[1]),
    "<frozen",
)

Kind = tuple[Any, tuple[int, ...], Any, jax.sharding.Sharding]  # traceback, shape, dtype, sharding


class Site(NamedTuple):
    """A line of code and the function around it."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        """`train.py:12 (main)`, relative to the current folder where it lies inside."""
        path, here = Path(self.file), Path.cwd()
        shown = path.relative_to(here) if path.is_relative_to(here) else path
        return f"{shown}:{self.line} ({self.function})"


@dataclass(frozen=True)
class Leak:
    """Arrays made at one line that become more and more.

    Attributes:
      site: the line; None where the arrays do not know it.
      kinds: their shapes, dtypes and shardings, the largest first.
      count: how many are alive.
      grown: how many more than `steps` steps before.
      steps: those that were looked at.
      bytes: of those `grown`, on each device that holds them.
    """

    site: Site | None
    kinds: tuple[str, ...]
    count: int
    grown: int
    steps: int
    bytes: int

    def __str__(self) -> str:
        """One line for a person."""
        more = f" and other kinds ({len(self.kinds) - 1})" if len(self.kinds) > 1 else ""
        return (
            f"arrays made at {self.site or 'an unknown line'} are kept: {self.count} alive, "
            f"{self.grown} more than {self.steps} steps ago, {self.bytes:,} bytes per device: "
            f"{self.kinds[0]}{more}"
        )


class LeakWatch:
    """Counts the live arrays after every step, and finds those that become more and more."""

    def __init__(self) -> None:
        self._counts: dict[Kind, Rising] = {}
        self._told: set[Site | None] = set()

    def look(self) -> list[Leak]:
        """Takes a census; the leaks that are new, one for each line of code."""
        seen = census()
        # What has none alive is forgotten: nothing here grows from step to step either.
        self._counts = {kind: self._counts.get(kind) or Rising() for kind in seen}
        suspects = {
            kind: growth for kind, n in seen.items() if (growth := self._counts[kind].add(n))
        }
        if not suspects:
            return []
        gc.collect()  # what only waits for the garbage collector is no leak
        seen = census()
        leaks: dict[Site | None, list[Kind]] = {}
        for kind, growth in suspects.items():
            if seen[kind] < growth.now:
                self._counts[kind].doubt()
            elif (where := site(kind[0])) not in self._told:
                leaks.setdefault(where, []).append(kind)
        self._told |= set(leaks)
        return [
            Leak(
                where,
                kinds=tuple(dict.fromkeys(map(describe, sorted(kinds, key=bytes_of)[::-1]))),
                count=sum(seen[kind] for kind in kinds),
                grown=sum(suspects[kind].grown for kind in kinds),
                steps=max(suspects[kind].steps for kind in kinds),
                bytes=sum(suspects[kind].grown * bytes_of(kind) for kind in kinds),
            )
            for where, kinds in leaks.items()
        ]


class Growth(NamedTuple):
    """A count that rose by `grown` over `steps` steps, to `now` at least."""

    grown: int
    steps: int
    now: int


@dataclass
class Rising:
    """Finds out whether a count rises for good.

    Attributes:
      minima: by length of the window, which is WINDOW ** (index + 1): the least count of the last
        windows, at most WINDOW of them.
      parts: by length of the window: the counts, or least counts of shorter windows, of the one
        that is not over.
      least: the shortest windows that are believed, as an index.
    """

    minima: list[list[int]] = field(default_factory=list)
    parts: list[list[int]] = field(default_factory=list)
    least: int = 0

    def add(self, count: int) -> Growth | None:
        """Takes the count after one more step; how it grew, where it rose in every window."""
        growth = None
        for level in range(len(self.parts) + 1):
            if level == len(self.parts):
                self.parts.append([])
                self.minima.append([])
            self.parts[level].append(count)
            if len(self.parts[level]) < WINDOW:
                break
            count = min(self.parts[level])
            self.parts[level] = []
            minima = self.minima[level] = [*self.minima[level], count][-WINDOW:]
            rises = [b - a for a, b in pairwise(minima)]
            if len(minima) < WINDOW or level < self.least:
                continue
            if min(rises) >= max(STEADY, max(rises) / 2):
                steps = (WINDOW - 1) * WINDOW ** (level + 1)
                growth = Growth(minima[-1] - minima[0], steps, minima[-1])
        return growth

    def doubt(self) -> None:
        """It was a false alarm: only longer windows are believed from here on."""
        self.least += 1


def census() -> Counter[Kind]:
    """How many arrays are alive of each kind, in this process."""
    return Counter((x.traceback, x.shape, x.dtype, x.sharding) for x in jax.live_arrays())


def site(traceback: Any) -> Site | None:
    """The innermost line of a stack that is not of Python or of an installed package."""
    frames = traceback.frames if traceback is not None else []
    own = [frame for frame in frames if not frame.file_name.startswith(LIBRARIES)]
    for frame in own or frames:
        return Site(frame.file_name, frame.line_num, frame.function_name)
    return None


def describe(kind: Kind) -> str:
    """`float32[8,16] PartitionSpec('fsdp', None)`."""
    _, shape, dtype, sharding = kind
    spec = getattr(sharding, "spec", type(sharding).__name__)
    return f"{dtype}[{','.join(map(str, shape))}] {spec}"


def bytes_of(kind: Kind) -> int:
    """Bytes of one such array on each device that holds it."""
    _, shape, dtype, sharding = kind
    return int(math.prod(sharding.shard_shape(shape)) * dtype.itemsize)
