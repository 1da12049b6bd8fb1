"""Memory as it is: figures for every logged row, profiles on demand, and an end out of memory.

with MemoryWatch(workdir / "memory") as watch:
    for step in ...:
        state, metrics = run_step(state, batch)
        watch.after(step)            # leaks; a profile if SIGUSR1 has asked for one
        row |= watch.row()           # when a row is written
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import jax
import psutil

from memory.leaks import LeakWatch
from parallel.compilation import device_bytes

log = logging.getLogger(__name__)

COMPILATION = "/jax/core/compile/backend_compile_duration"  # JAX's event, cached programs included
MIB = 2**20


class OutOfMemory(ValueError):
    """A device ran out of memory while training."""


class DeviceMemory(NamedTuple):
    """Bytes of the fullest local device.

    Attributes:
      in_use: now.
      peak: the most there ever was in this process; None where no allocator says (CPU).
    """

    in_use: int
    peak: int | None


class MemoryWatch:
    """Watches the memory of a training run; a context manager for the loop.

    Inside it, SIGUSR1 asks for a memory profile after the current step, and running out of memory
    ends in one with an `OutOfMemory`.

    Args:
      folder: for profiles, made when one is written (`step-N.prof`, read by `pprof`).

    Attributes:
      compilations: programs compiled, or read from the cache on disk, since this was made.
      seconds_blocked: how long the host was busy here.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = psutil.Process()
        self._leaks = LeakWatch()
        self._step = self._peak = 0
        self._asked = False
        self._batch: dict[str, str] = {}  # name -> type, of the step last compiled
        self._compiled_bytes = 0
        self.compilations = 0
        self.seconds_blocked = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def __enter__(self) -> MemoryWatch:
        self._before = signal.signal(signal.SIGUSR1, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGUSR1, self._before)
        jax.monitoring.unregister_event_duration_listener(self._count)
        if error is not None and is_out_of_memory(error):
            raise self._out_of_memory(error) from error

    def row(self) -> dict[str, float]:
        """What a logged row says of memory: bytes and counts.

        `device_bytes` in use and `device_peak_bytes` of the fullest local device (on CPU, where no
        allocator says, the live arrays, and the most of them that a row has seen), `live_arrays`,
        `live_array_bytes` per device, `host_bytes` (resident), `compilations`.
        """
        since = time.perf_counter()
        arrays = jax.live_arrays()
        alive = live_bytes(arrays)
        in_use, peak = device_memory() or DeviceMemory(alive, None)
        self._peak = max(self._peak, in_use)
        row = {
            "device_bytes": in_use,
            "device_peak_bytes": self._peak if peak is None else peak,
            "live_arrays": len(arrays),
            "live_array_bytes": alive,
            "host_bytes": self._process.memory_info().rss,
            "compilations": self.compilations,
        }
        self.seconds_blocked += time.perf_counter() - since
        return row

    def compiled(self, step: Any, batch: Mapping[str, Any]) -> int:
        """Takes note of the step that was just compiled; its bytes per device.

        Any but the first is a warning, which says what has changed.

        Args:
          step: the compiled program.
          batch: the arrays, or their shapes, that it was compiled for.
        """
        types = {name: f"{x.dtype}[{','.join(map(str, x.shape))}]" for name, x in batch.items()}
        if self._batch:
            log.warning("the step is compiled again: %s", changes(self._batch, types))
        self._batch, self._compiled_bytes = types, device_bytes(step)
        return self._compiled_bytes

    def after(self, step: int) -> None:
        """Looks for leaks after a step, and writes the profile that was asked for."""
        since = time.perf_counter()
        self._step = step
        for leak in self._leaks.look():
            log.warning("%s", leak)
        self.seconds_blocked += time.perf_counter() - since
        if self._asked:
            self._asked = False
            print(f"memory profile, for pprof: {self.write_profile(f'step-{step}')}", flush=True)

    def write_profile(self, name: str) -> Path:
        """Writes what is alive on the devices, by the stack that made it; returns the file."""
        process = f"-process-{jax.process_index()}" if jax.process_count() > 1 else ""
        file = self._folder / f"{name}{process}.prof"
        self._folder.mkdir(parents=True, exist_ok=True)
        jax.profiler.save_device_memory_profile(str(file))
        return file

    def _out_of_memory(self, error: BaseException) -> OutOfMemory:
        step = self._step + 1
        needed = f"; it was compiled for {self._compiled_bytes / MIB:,.0f} MiB per device"
        return OutOfMemory(
            f"out of memory at step {step}{needed if self._compiled_bytes else ''}: "
            f"{first_line(error)}. What is alive is in "
            f"{self.write_profile(f'step-{step}-out-of-memory')}, for pprof. Less is needed with "
            f"config.remat.policy=full, a larger config.train.grad_accumulation, or "
            f"config.parallel.zero=3 and a larger config.mesh.fsdp; plan.py says what each saves"
        )

    def _count(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.compilations += event == COMPILATION

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


def device_memory() -> DeviceMemory | None:
    """What the allocator says of the fullest local device, temporaries included; None on CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if not all("bytes_in_use" in stat for stat in stats):
        return None
    peaks = [stat.get("peak_bytes_in_use", stat["bytes_in_use"]) for stat in stats]
    return DeviceMemory(max(stat["bytes_in_use"] for stat in stats), max(peaks))


def live_bytes(arrays: Iterable[jax.Array]) -> int:
    """Bytes of arrays on one device; every one is taken to be divided over all, or small.

    What lies in the host's memory does not count.
    """
    return sum(
        math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array in arrays
        if not (array.is_deleted() or str(array.sharding.memory_kind).endswith("host"))
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory did not suffice, in this error or in one that it came of."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def first_line(error: BaseException) -> str:
    """The first line of an error of XLA, without the code before it."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.removeprefix("RESOURCE_EXHAUSTED: ").rstrip(". ")


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """`tokens, targets: int32[8,32] -> int32[8,64]`: what is no longer as it was."""
    names: dict[str, list[str]] = {}
    for name in sorted({*before, *now}):
        was, is_now = before.get(name, "none"), now.get(name, "none")
        if was != is_now:
            names.setdefault(f"{was} -> {is_now}", []).append(name)
    parts = [f"{', '.join(changed)}: {change}" for change, changed in names.items()]
    return "; ".join(parts) or "nothing in the batch has changed"
