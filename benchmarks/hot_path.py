"""How much of a training step the host spends waiting for data and writing metrics, in train.py.

Command: python benchmarks/hot_path.py [--config=configs/tiny.py --steps=150 --warm_up=50
    --config.KEY=VALUE ...]

Runs train.py's own loop and reads its clocks: `Loader.seconds_blocked` (waiting for a batch),
`Metrics.seconds_blocked` (rows made and written, without waiting for the device) and
`Checkpoints.seconds_blocked`, over the steps after the warm-up. Prints one JSON object; the run
itself goes to stderr. Under 2% for data and logging is what the loop promises.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

import data.dataset
import train
import training.checkpoint
import training.metrics
from config_border import load_config, override
from data.loader import Loader, TrainBatches
from training.checkpoint import Checkpoints
from training.metrics import Metrics

opened: dict[str, Any] = {}  # what train.py has made, by name
seen: list[dict[str, float]] = []  # the clocks after the warm-up and at the end


class WatchedLoader(Loader):
    """Known to this file if it is the one of the training batches."""

    def __init__(self, batches: Any, *arguments: Any) -> None:
        super().__init__(batches, *arguments)
        if isinstance(batches, TrainBatches):
            opened["data"] = self


class WatchedCheckpoints(Checkpoints):
    """Known to this file."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        opened["checkpoints"] = self


class WatchedMetrics(Metrics):
    """Known to this file; reads all clocks when a step is handed over."""

    first = last = 0

    def push(self, step: int, device_metrics: Mapping[str, jax.Array]) -> None:
        super().push(step, device_metrics)
        opened["logging"] = self
        if step in (self.first, self.last):
            clocks = {name: thing.seconds_blocked for name, thing in opened.items()}
            seen.append(clocks | {"all": time.perf_counter()})


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--warm_up", type=int, default=50)
    args, overrides = parser.parse_known_args()
    WatchedMetrics.first, WatchedMetrics.last = args.warm_up, args.warm_up + args.steps
    # One more step: the last one is followed by an evaluation.
    steps = f"--config.train.steps={WatchedMetrics.last + 1}"
    config = override(load_config(args.config), [steps, *overrides])
    data.dataset.Loader = WatchedLoader  # type: ignore[misc, assignment]
    training.checkpoint.Checkpoints = WatchedCheckpoints  # type: ignore[misc, assignment]
    training.metrics.Metrics = WatchedMetrics  # type: ignore[misc, assignment]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        train.main(config, Path(folder))
    seconds = {name: seen[1][name] - seen[0][name] for name in seen[0]}
    share = {name: seconds[name] / seconds["all"] for name in opened}
    result = {
        "config": args.config,
        "overrides": overrides,
        "steps": args.steps,
        "step_seconds": seconds["all"] / args.steps,
        "share_blocked": share,
        "data_and_logging": share["data"] + share["logging"],
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
