"""Where rows of metrics go: a JSON-lines file, TensorBoard, Weights & Biases, the terminal.

Every writer has `write(row)` and `close()`. A row is a dict of numbers; `step` is one of them.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

log = logging.getLogger(__name__)
Row = Mapping[str, float]


class Writer(Protocol):
    """What `Metrics` needs of a writer."""

    def write(self, row: Row) -> None:
        """Takes one row."""

    def close(self) -> None:
        """Ends the output."""


class JsonLines:
    """One JSON object a row; what is not finite is null, because JSON has no NaN.

    Args:
      path: the file. It is cut back to the rows up to `step`, in one atomic act: a line that a kill
        has torn goes, and rows that the run is about to write again.
      step: the step that the run continues from; 0 starts anew.
    """

    def __init__(self, path: Path, step: int) -> None:
        before = path.read_bytes() if path.exists() else b""
        kept = b"".join(line for line in before.splitlines(True) if _is_row_up_to(line, step))
        if kept != before:
            part = path.with_suffix(".part")
            part.write_bytes(kept)
            part.replace(path)
        path.touch()
        self._path, self._size, self._waiting = path, len(kept), b""

    def write(self, row: Row) -> None:
        """Appends a row; on a full disk it is kept, and tried again with the next."""
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._waiting += json.dumps(finite).encode() + b"\n"
        try:
            with self._path.open("ab", buffering=0) as file:
                file.truncate(self._size)  # What a failed try has left of a line.
                if file.write(self._waiting) != len(self._waiting):
                    raise OSError("the disk is full")
        except OSError as error:
            log.warning("--workdir: %s could not be written yet: %s", self._path, error)
        else:
            self._size += len(self._waiting)
            self._waiting = b""

    def close(self) -> None:
        """Nothing is open between two rows."""


def _is_row_up_to(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


class TensorBoard:
    """Event files, through TensorBoard's own writer: TensorFlow is not imported.

    Args:
      directory: where the event files are.
      step: the step that the run continues from; TensorBoard hides what earlier files have after.
    """

    def __init__(self, directory: Path, step: int) -> None:
        # Imported here: it takes a second, which a run without it should not spend.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(directory), flush_secs=10)
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, row: Row) -> None:
        """Queues a row's scalars; a thread writes them."""
        summary = self._summary(
            value=[
                self._summary.Value(tag=name, simple_value=value)
                for name, value in row.items()
                if name != "step"
            ]
        )
        event = self._event(wall_time=time.time(), step=int(row["step"]), summary=summary)
        self._writer.add_event(event)

    def close(self) -> None:
        """Writes what is queued."""
        self._writer.close()


class WeightsAndBiases:
    """An offline run of Weights & Biases: files for `wandb sync`; the network is not touched.

    Args:
      workdir: the run's folder, which names it.
      config: the resolved config, to be shown beside the curves.

    Raises:
      ValueError: the extra is not installed.
    """

    def __init__(self, workdir: Path, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # It would report crashes home.
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "config.logging.wandb = True: wandb is not installed; run "
                "pip install -e '.[wandb]', or set it to False"
            ) from error
        self._run = wandb.init(
            mode="offline", dir=str(workdir), name=workdir.name, config=dict(config)
        )

    def write(self, row: Row) -> None:
        """Queues a row."""
        self._run.log(dict(row), step=int(row["step"]))

    def close(self) -> None:
        """Writes what is queued."""
        self._run.finish()


class Progress:
    """The row as a person wants it: one line, drawn over the last on a terminal, else one a row.

    Args:
      total_steps: the last step of the run.
      stream: default is standard output.
    """

    def __init__(self, total_steps: int, stream: TextIO | None = None) -> None:
        self._total = total_steps
        self._stream = sys.stdout if stream is None else stream
        self._terminal = self._stream.isatty()

    def write(self, row: Row) -> None:
        """Prints a row."""
        step = int(row["step"])
        parts = [
            f"step {step:>{len(str(self._total))}}/{self._total}",
            f"loss {row['loss']:.4f}",
            f"{row['tokens_per_second']:,.0f} tokens/s",
        ]
        if "mfu" in row:
            parts.append(f"MFU {row['mfu']:.1%}")
        if "device_bytes" in row:
            now, peak = (row[f"device_{name}"] / 2**30 for name in ("bytes", "peak_bytes"))
            parts.append(f"memory {now:.2f} GiB, peak {peak:.2f}")
        if "eval_loss" in row:
            parts.append(f"held-out loss {row['eval_loss']:.4f}")
        seconds = round((self._total - step) * row["step_seconds"])
        parts.append(f"{datetime.timedelta(seconds=seconds)} left")
        line = " | ".join(parts)
        # The carriage return comes last, so that a message of someone else's starts a line.
        print(
            f"\x1b[2K{line}\r" if self._terminal else line,
            end="" if self._terminal else "\n",
            file=self._stream,
            flush=True,
        )

    def close(self) -> None:
        """Leaves the last line standing."""
        if self._terminal:
            print(file=self._stream, flush=True)
