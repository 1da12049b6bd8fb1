"""Reads a compiled program: which collectives run, and inside which loop."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(rf"= (\(.*?\)|\S+) ({COLLECTIVES})(?:-start)?\(")
SHAPE = re.compile(r"([a-z]+\d+)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """One collective: its kind, the shapes it gives, and the computation that holds it."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    where: str


def collectives(text: str) -> list[Collective]:
    """All collectives of an HLO text; one that combines several arrays is one."""
    found, where = [], ""
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            where = head.group(1)
        if match := INSTRUCTION.search(line):
            shapes = tuple(
                tuple(int(n) for n in dims.split(",") if n)
                for _, dims in SHAPE.findall(match.group(1))
            )
            found.append(Collective(match.group(2), shapes, where))
    return found


def per_layer(text: str, shape: tuple[int, ...]) -> list[Counter[str]]:
    """For each loop body, in the order of the program, its collectives over arrays of `shape`."""
    bodies: dict[str, Counter[str]] = {}
    for c in collectives(text):
        if not c.where.startswith("main") and shape in c.shapes:
            bodies.setdefault(c.where, Counter())[c.kind] += 1
    return list(bodies.values())
