"""A schedule from a file: its table, and one line for whatever is wrong with the file."""

from __future__ import annotations

import os

import pytest

from parallel.pipeline import PipelineConfig
from parallel.schedule_file import read_schedule
from parallel.schedule_kinds import make_schedule

HEAD = "from parallel.schedule import Action, B, F, W\n"
GPIPE = (
    "def orders(stages, microbatches):\n"
    "    m = range(microbatches)\n"
    "    return [[F(i) for i in m] + [B(i) for i in reversed(m)]] * stages\n"
)
V = (
    "path = 'v'\n"
    "def orders(p, m):\n"
    "    half = [[F(i, c) for i in range(m) for c in (0, 1)]] * p\n"
    "    return [order + [B(a.microbatch, a.chunk) for a in order[::-1]] for order in half]\n"
)


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "mine.py").write_text(HEAD + text)
        return str(tmp_path / "mine.py")

    return write


def test_orders_of_a_file_are_the_table_by_its_name(file):
    config = PipelineConfig(orders=file(GPIPE), microbatches=5)
    assert config.table(3).name == "mine"
    assert config.table(3).ticks == make_schedule("gpipe", 3, 5).ticks
    assert config.table(2, 4).ticks == make_schedule("gpipe", 2, 4).ticks


def test_a_changed_file_is_read_again(file, tmp_path):
    path = file(GPIPE)
    assert read_schedule(path, 2, 4).chunks == 1
    file(V)
    os.utime(path, ns=(1, 1))  # another time, whatever the file system's clock can tell apart
    assert (read_schedule(path, 1, 4).chunks, read_schedule(path, 1, 4).path) == (2, "v")


def test_single_gives_every_action_its_tick(file):
    def cells(path):
        rows = read_schedule(path, 1, 3).ticks
        return {"".join(action.kind for action in cell) for row in rows for cell in row}

    assert cells(file(GPIPE)) == {"F", "FBW", "BW"}
    assert cells(file("single = True\n" + GPIPE)) == {"F", "BW"}


def orders(returned: str) -> str:
    return f"def orders(p, m): return {returned}"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "defines no function orders; give a Python file that defines orders(stages, m"),
        ("orders = 3", "defines no function orders"),
        ("def orders(:", "line 2: invalid syntax"),
        ("\nimport no_such", "line 3: ModuleNotFoundError: No module named 'no_such'"),
        ("def orders(p, m):\n    return 1 / 0", "line 3: ZeroDivisionError: division by zero"),
        ("def orders(p): pass", "TypeError: orders() takes 1 positional argument but 2 were"),
        (orders("None"), "orders(2, 4) returns NoneType; give for each of 2 stages a list of F(i)"),
        (orders("[[F(0), B(0)]]"), "orders(2, 4) has 1 stages; config.mesh.pipe = 2"),
        (orders("[[F(0), ('B', 0)]] * 2"), "orders(2, 4) has ('B', 0) on stage 0; give"),
        (orders("[[F(0)], F(0)]"), "orders(2, 4) has Action(kind='F', microbatch=0, chunk=0) on"),
        (orders("[[F(0.5)]] * 2"), "orders(2, 4) has Action(kind='F', microbatch=0.5, chunk=0) on"),
        (
            orders("[[F(i) for i in range(3)] + [B(i) for i in range(3)]] * 2"),
            (
                "orders(2, 4) has 3 micro-batches; config.pipeline.microbatches = 4 wants those "
                "from 0 to 3"
            ),
        ),
        (
            orders("[[a for i in range(m) for a in (F(i), B(i))], [F(0), B(0)]]"),
            (
                "schedule 'mine', tick 4, stage 0: B of micro-batch 1, chunk 0 waits for B of "
                "micro-batch 1, chunk 0 on stage 1, which is in no order"
            ),
        ),
        ("path = 'V'\n" + GPIPE, "schedule 'mine': path = 'V'; choose loop or v"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(file, text, why):
    path = file(text)
    with pytest.raises(ValueError) as caught:
        read_schedule(path, 2, 4)
    message = str(caught.value)
    assert message.startswith(f"config.pipeline.orders = {path!r}: {why}")
    assert "\n" not in message


def test_a_file_that_is_not_there(tmp_path):
    for path, what in ((tmp_path, "a folder"), (tmp_path / "none.py", "no such file")):
        with pytest.raises(ValueError) as caught:
            read_schedule(str(path), 2, 4)
        assert str(caught.value) == (
            f"config.pipeline.orders = {str(path)!r}: {what}; give a Python file that defines "
            "orders(stages, microbatches)"
        )
