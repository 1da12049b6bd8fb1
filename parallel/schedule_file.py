"""A schedule from a file of one's own, `config.pipeline.orders`.

The file is Python, as configs are, and run with the same trust. It defines

    def orders(stages, microbatches):
        # for each stage its actions F(i), B(i) and W(i) of `parallel.schedule`, first to last

as `parallel.schedule_orders.from_orders` takes them: without any W each is fused with its B. With
several chunks a stage they are F(i, chunk), and `path = "v"` in the file says how these lie on the
stages; `single = True` gives each action a tick of its own.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from numbers import Integral
from pathlib import Path
from typing import Any

from parallel.schedule import Action, Schedule
from parallel.schedule_orders import from_orders

WANTED = "a Python file that defines orders(stages, microbatches)"


def read_schedule(file: str, stages: int, microbatches: int) -> Schedule:
    """The table of a file's orders, checked; its name is the file's, without the suffix.

    Raises:
      ValueError: naming config.pipeline.orders and the file: there is none, it fails, what it gives
        are no orders of these stages and micro-batches, or `from_orders` refuses them.
    """
    path = Path(file)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise ValueError(f"{_key(file)}: {what}; give {WANTED}")
    return _read(file, path.stat().st_mtime_ns, stages, microbatches)


@lru_cache(maxsize=64)  # a step, its plan and its layout at rest all ask for the table
def _read(file: str, _changed: int, stages: int, microbatches: int) -> Schedule:
    names: dict[str, Any] = {"__name__": Path(file).stem, "__file__": file}
    with _in_one_line(file):
        exec(compile(Path(file).read_text(), file, "exec"), names)
    if not callable(names.get("orders")):
        raise ValueError(f"{_key(file)}: defines no function orders; give {WANTED}")
    with _in_one_line(file):
        given = names["orders"](stages, microbatches)
    orders = _checked(given, f"{_key(file)}: orders({stages}, {microbatches})", stages)
    options = {name: names[name] for name in ("path", "single") if name in names}
    try:
        schedule = from_orders(Path(file).stem, orders, **options)
    except ValueError as error:
        raise ValueError(f"{_key(file)}: {error}") from error
    if schedule.microbatches != microbatches:
        raise ValueError(
            f"{_key(file)}: orders({stages}, {microbatches}) has {schedule.microbatches} "
            f"micro-batches; config.pipeline.microbatches = {microbatches} wants those from 0 to "
            f"{microbatches - 1}"
        )
    return schedule


def _checked(given: Any, call: str, stages: int) -> list[list[Action]]:
    """What `orders` returned, if it is a list of actions for each stage."""
    right = f"give for each of {stages} stages a list of F(i), B(i) and W(i) of parallel.schedule"
    if not isinstance(given, list | tuple):
        raise ValueError(f"{call} returns {type(given).__name__}; {right}")
    if len(given) != stages:
        raise ValueError(f"{call} has {len(given)} stages; config.mesh.pipe = {stages}; {right}")
    for stage, order in enumerate(given):
        listed = isinstance(order, list | tuple) and not isinstance(order, Action)
        wrong = [one for one in order if not _is_action(one)] if listed else [order]
        if wrong:
            raise ValueError(f"{call} has {wrong[0]!r} on stage {stage}; {right}")
    return [list(order) for order in given]


def _is_action(one: Any) -> bool:
    return isinstance(one, Action) and all(isinstance(number, Integral) for number in one[1:])


@contextmanager
def _in_one_line(file: str) -> Iterator[None]:
    """Errors of the file's own code become one line with the place."""
    try:
        yield
    except SyntaxError as error:
        raise ValueError(f"{_key(file)}: line {error.lineno}: {error.msg}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f"line {frame.lineno}: " for frame in frames if frame.filename == file]
        place = lines[-1] if lines else ""
        raise ValueError(f"{_key(file)}: {place}{type(error).__name__}: {error}") from error


def _key(file: str) -> str:
    return f"config.pipeline.orders = {file!r}"
