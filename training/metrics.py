"""Metrics, fetched one step late: the host never waits for the step that it has just dispatched.

metrics = Metrics(workdir, ...)
for step in range(first, last + 1):
    state, device_metrics = train_step(state, batch)   # dispatched, not done
    metrics.push(step, device_metrics)                 # waits for the step before, and logs that
metrics.close()
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from parallel.chips import peak_flops
from training.writers import JsonLines, Progress, TensorBoard, WeightsAndBiases, Writer


@dataclass(frozen=True)
class LoggingConfig:
    """Where metrics go besides `metrics.jsonl` and the terminal (`config.logging`).

    Attributes:
      tensorboard: write event files under `tensorboard/`.
      wandb: write an offline run of Weights & Biases (extra `wandb`).
    """

    tensorboard: bool = True
    wandb: bool = False


class Metrics:
    """The metrics of one run; process 0 alone writes.

    Rows are written for step 1, every `log_every` steps, the last step, and a step before a pause.
    A row has what the step returned, and `step`, `step_seconds` and `tokens_per_second` (means over
    the steps since the row before; for the first row, since this object was made), `mfu` where the
    peak is known, and what `watch` says.

    Args:
      workdir: the run's folder.
      config: the other places to write to.
      total_steps: the last step of the run.
      log_every: steps from one row to the next (`config.train.log_every`).
      max_skipped: steps in a row without a finite gradient that are too many
        (`config.train.max_skipped`).
      step: the step that the run continues from; later rows of earlier runs are cut.
      flops_per_token: of the model, forward and backward, without recomputation; None: no MFU.
      run_config: the resolved config, for Weights & Biases.
      watch: more numbers for a row, such as memory in use; called when the row is made.

    Attributes:
      seconds_blocked: how long the host was busy here, in all, without its waiting for the device.

    Raises:
      ValueError: `log_every` is below 1, or an extra is missing.
    """

    def __init__(
        self,
        workdir: Path,
        config: LoggingConfig,
        *,
        total_steps: int,
        log_every: int,
        max_skipped: int,
        step: int = 0,
        flops_per_token: float | None = None,
        run_config: Mapping[str, Any] | None = None,
        watch: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        for name, value in (("log_every", log_every), ("max_skipped", max_skipped)):
            if value < 1:
                raise ValueError(f"config.train.{name} = {value}: at least 1 is right")
        self._total_steps, self._log_every, self._max_skipped = total_steps, log_every, max_skipped
        self._flops_per_token = flops_per_token
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self._watch = watch
        self._writers: list[Writer] = []
        if jax.process_index() == 0:
            self._writers.append(JsonLines(workdir / "metrics.jsonl", step))
            if config.tensorboard:
                self._writers.append(TensorBoard(workdir / "tensorboard", step))
            if config.wandb:
                self._writers.append(WeightsAndBiases(workdir, run_config or {}))
            self._writers.append(Progress(total_steps))
        self.seconds_blocked = 0.0
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None  # On its way.
        self._row: dict[str, float] | None = None  # Made by `paused`, not yet written.
        self._last: dict[str, float] = {}
        self._skipped = 0  # Steps in a row without a finite gradient.
        self._steps, self._tokens = 0, 0.0  # Of the row to come, and the time where it begins:
        self._since = self._now = time.perf_counter()

    def push(self, step: int, device_metrics: Mapping[str, jax.Array]) -> None:
        """Takes the scalars of the step just dispatched, and logs the step before.

        Args:
          step: its number, from 1.
          device_metrics: at least `loss` and `tokens`; `finite` too where steps can be skipped.

        Raises:
          ValueError: too many steps in a row had no finite gradient.
        """
        before, self._pending = self._pending, (step, device_metrics)
        self._log(before)

    @contextmanager
    def paused(self) -> Iterator[dict[str, float]]:
        """Time in here is not training; what is put into the dict joins the row of the last step.

        with metrics.paused() as row:
            row["eval_loss"] = evaluate(...)
        """
        pending, self._pending = self._pending, None
        row: dict[str, float] = {}
        if pending is not None:
            self._fetch(*pending)
            row = self._make_row()
        start = time.perf_counter()
        yield row
        self._since += time.perf_counter() - start
        self._row = row

    def flush(self) -> bool:
        """Logs the step last pushed, and says whether its gradient was finite."""
        pending, self._pending = self._pending, None
        self._log(pending)
        return self._skipped == 0

    def close(self) -> None:
        """Logs the step last pushed and closes all outputs."""
        try:
            self.flush()
        finally:
            for writer in self._writers:
                writer.close()
            self._writers = []

    def _log(self, pending: tuple[int, Mapping[str, jax.Array]] | None) -> None:
        """Writes what is due, and gives up when too many steps were skipped."""
        if self._row:
            self._write(self._row)
        self._row = None
        if pending is not None:
            step = pending[0]
            self._fetch(*pending)
            if step in (1, self._total_steps) or step % self._log_every == 0:
                self._write(self._make_row())
        if self._skipped >= self._max_skipped:
            self._pending = None  # so that `close` says nothing more
            raise ValueError(
                f"config.train.max_skipped = {self._max_skipped}: step {self._last['step']} is the "
                f"last of {self._skipped} in a row without a finite loss and gradient; lower "
                f"config.optimizer.learning_rate, raise config.optimizer.warmup_steps, or look at "
                f"the data of these steps. Earlier checkpoints are intact"
            )

    def _fetch(self, step: int, on_device: Mapping[str, jax.Array]) -> None:
        """Waits for a step's metrics, which become `_last`."""
        jax.block_until_ready(on_device)
        self._now = time.perf_counter()
        values = {name: value.item() for name, value in jax.device_get(dict(on_device)).items()}
        self._last = {"step": step} | values
        finite = values.get("finite", True) and math.isfinite(values["loss"])
        self._skipped = 0 if finite else self._skipped + 1
        self._steps += 1
        self._tokens += values["tokens"]
        self.seconds_blocked += time.perf_counter() - self._now

    def _make_row(self) -> dict[str, float]:
        """The row of the step last fetched."""
        start = time.perf_counter()
        seconds = max(self._now - self._since, 1e-9)
        row = self._last | {
            "step_seconds": seconds / self._steps,
            "tokens_per_second": self._tokens / seconds,
            **self._watch(),
        }
        if self._flops_per_token and self._peak:
            peak = self._peak * jax.device_count()
            row["mfu"] = self._flops_per_token * row["tokens_per_second"] / peak
        self._since, self._steps, self._tokens = self._now, 0, 0.0
        self.seconds_blocked += time.perf_counter() - start
        return row

    def _write(self, row: Mapping[str, float]) -> None:
        start = time.perf_counter()
        for writer in self._writers:
            writer.write(row)
        self.seconds_blocked += time.perf_counter() - start
