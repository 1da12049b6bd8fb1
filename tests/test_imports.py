"""Imports only go down the floors, and mesh axes are named nowhere but in `parallel/`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel.mesh import AXES

ROOT = Path(__file__).parent.parent
FLOORS = {
    "parallel": 0,
    "models": 1,
    "data": 1,
    "training": 2,
    "generation": 2,
    "memory": 3,
    "hf": 3,
    "harness": 3,
    "compress": 3,
}
COMMANDS = {path.stem for path in ROOT.glob("*.py")}
OURS = {*FLOORS, *COMMANDS, "configs", "benchmarks", "tests"}
AMBIGUOUS = "data"  # a mesh axis and a room; looked for only inside a PartitionSpec


def imports(tree: ast.AST, room: str) -> Iterator[tuple[int, str]]:
    """`(line, top-level module)` of every import, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, room if node.level else (node.module or "").partition(".")[0]


def wrong_imports(source: str, room: str) -> list[str]:
    """The imports of a file in a room that go up, or sideways to another room of its floor."""
    wrong = []
    for line, target in imports(ast.parse(source), room):
        if target == room or target not in OURS:
            continue
        if room == "configs" or target not in FLOORS or FLOORS[target] >= FLOORS[room]:
            wrong.append(f"line {line}: {room} imports {target}")
    return wrong


def axis_names(source: str) -> list[str]:
    """The places of a file where a mesh axis is written as a string."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value in set(AXES) - {AMBIGUOUS}:
            found.append(f"line {node.lineno}: {node.value!r}")
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("P", "PartitionSpec")):
            inside = [n for arg in node.args for n in ast.walk(arg) if isinstance(n, ast.Constant)]
            found += [f"line {n.lineno}: {n.value!r}" for n in inside if n.value == AMBIGUOUS]
    return found


def files(room: str) -> list[Path]:
    """Those of a room; `python -m ROOM` is a command line, above all rooms."""
    return [f for f in sorted((ROOT / room).rglob("*.py")) if f.name != "__main__.py"]


@pytest.mark.parametrize("room", [room for room in (*FLOORS, "configs") if (ROOT / room).is_dir()])
def test_imports_only_go_down(room):
    assert files(room)
    wrong = {str(f.relative_to(ROOT)): wrong_imports(f.read_text(), room) for f in files(room)}
    assert not {file: lines for file, lines in wrong.items() if lines}


@pytest.mark.parametrize("room", ["models", "training"])
def test_no_mesh_axis_is_named_above_parallel(room):
    named = {str(f.relative_to(ROOT)): axis_names(f.read_text()) for f in files(room)}
    assert not {file: lines for file, lines in named.items() if lines}


def test_configs_import_nothing_but_ml_collections():
    for file in files("configs"):
        targets = {target for _, target in imports(ast.parse(file.read_text()), "configs")}
        assert targets <= {"ml_collections", "configs", "__future__"}, file


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("parallel", "import models"),  # up
        ("models", "from data.loader import x"),  # sideways
        ("data", "def f():\n    from training import step"),  # up, hidden in a function
        ("training", "import numpy, cli"),
        ("models", "from configs import tiny"),
        ("configs", "from models.config import ModelConfig"),
    ],
)
def test_the_check_sees_a_wrong_import(room, source):
    assert wrong_imports(source, room)


def test_the_check_lets_right_imports_pass():
    source = (
        "import jax\nfrom . import masks\nfrom parallel.rules import Rules\nimport models.block"
    )
    assert not wrong_imports(source, "models")


def test_the_check_sees_an_axis_name():
    assert axis_names("x = f('fsdp')")
    assert axis_names("s = P(None, ('data',))")
    assert not axis_names("def f():\n    'over fsdp'\n    return {'data': 1}, 'tensors'")
