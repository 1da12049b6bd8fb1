"""Reads a traced program: its equations, those of loops and other inner programs included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax


def primitives(jaxpr: Any, name: str) -> Iterator[Any]:
    """All equations of a primitive, also inside other equations."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        for inner in inside(equation):
            yield from primitives(inner, name)


def inside(equation: Any) -> Iterator[Any]:
    """The programs that an equation holds: a loop's body, a function's."""
    values = list(equation.params.values())
    for value in jax.tree.leaves(values, is_leaf=lambda x: hasattr(x, "eqns")):
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner


def names(jaxpr: Any) -> set[str]:
    """The names that `checkpoint_name` gave."""
    return {equation.params["name"] for equation in primitives(jaxpr, "name")}
