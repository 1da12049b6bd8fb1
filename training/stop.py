"""SIGTERM and SIGINT end the training after a step, on all processes after the same one."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """`with StopSignal() as stop: ... if stop.requested(step): break`.

    SIGTERM, or the first SIGINT (Ctrl-C), asks for the stop; a second SIGINT ends the process as
    usual.

    With several processes the one that gets the signal cannot stop alone: the others would wait
    for it in their next collective. JAX's preemption service, which watches for SIGTERM in a thread
    of its own, has the coordinator find the step that the fastest process has reached and lets all
    stop after the next one. Until then a call reads a local flag: no message is sent, and the
    devices are not waited for, as an all-gather of flags would. SIGINT is handed to it as SIGTERM.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        self._several = jax.process_count() > 1
        # With several processes SIGTERM belongs to JAX, whose handler a handler here would replace.
        for number in (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`; every process asks after every step, with its number."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if self._several:
                os.kill(os.getpid(), signal.SIGTERM)
        self._asked = True
