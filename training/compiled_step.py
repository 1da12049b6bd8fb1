"""The step compiled ahead of its first run: once, or once for each length of rows in buckets."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax


class CompiledStep:
    """A jitted step (state, batch, ...) as one program for each shape of a batch.

    Args:
      jitted: the step.
      paused: entered while it compiles, which is not a step's time.
      bytes_of: (program, batch) -> its bytes per device, noted.
      say: prints a line for a person.
    """

    def __init__(
        self,
        jitted: Any,
        paused: Callable[[], AbstractContextManager[Any]],
        bytes_of: Callable[[Any, dict[str, jax.Array]], int],
        say: Callable[[str], None],
    ) -> None:
        self._jitted, self._paused, self._bytes_of, self._say = jitted, paused, bytes_of, say
        self._programs: dict[Any, Callable[..., Any]] = {}

    def __call__(self, state: Any, batch: dict[str, jax.Array], *more: Any) -> Any:
        shapes = tuple(array.shape for array in batch.values())
        if shapes not in self._programs:
            with self._paused():
                since = time.perf_counter()
                self._programs[shapes] = self._jitted.lower(state, batch, *more).compile()
                mib = self._bytes_of(self._programs[shapes], batch) / 2**20
                seconds = time.perf_counter() - since
                self._say(f"step compiled in {seconds:.1f} s: {mib:,.0f} MiB per device")
        return self._programs[shapes](state, batch, *more)
