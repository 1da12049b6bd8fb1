"""From config sections to dataclasses: keys and types are checked, and named where wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest
from ml_collections import ConfigDict

from config_types import build


@dataclass(frozen=True)
class Inner:
    size: int = 1


@dataclass(frozen=True)
class Example:
    count: int
    rate: float = 0.5
    on: bool = False
    name: str | None = None
    kind: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()
    rows: dict[str, tuple[str, ...]] = field(default_factory=dict)
    inner: Inner = Inner()


def test_build_makes_the_dataclass():
    section = ConfigDict({"count": 2, "rate": 1, "names": ["x"], "rows": {"k": ["v"]}, "name": "n"})
    made = build(Example, section, "config.example")
    assert made == Example(2, 1.0, names=("x",), rows={"k": ("v",)}, name="n")
    assert type(made.rate) is float
    assert build(Example, {"count": 1, "inner": {"size": 3}}, "e").inner == Inner(3)
    assert build(Example, {"count": 1, "name": None}, "e").name is None


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({}, "config.example.count: missing; give it a whole number"),
        ({"cont": 1}, "config.example.cont: no such key; did you mean config.example.count?"),
        ({"count": True}, "config.example.count = True: should be a whole number"),
        ({"count": 1.0}, "config.example.count = 1.0: should be a whole number"),
        ({"count": 1, "rate": "x"}, "config.example.rate = 'x': should be a number"),
        ({"count": 1, "on": 1}, "config.example.on = 1: should be true or false"),
        ({"count": 1, "name": 3}, "config.example.name = 3: should be a text or none"),
        ({"count": 1, "kind": "c"}, "config.example.kind = 'c': should be one of 'a', 'b'"),
        ({"count": 1, "names": "x"}, "config.example.names = 'x': should be a list"),
        ({"count": 1, "names": (1,)}, "config.example.names[0] = 1: should be a text"),
        ({"count": 1, "rows": {"k": "v"}}, "config.example.rows.k = 'v': should be a list"),
        ({"count": 1, "inner": {"sze": 1}}, "config.example.inner.sze: no such key"),
    ],
)
def test_build_names_what_is_wrong(section, words):
    with pytest.raises(ValueError) as error:
        build(Example, section, "config.example")
    assert str(error.value).startswith(words)
