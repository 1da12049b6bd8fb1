"""What the memory watch costs: host time of the census after every step and of the row's figures.

Command: python benchmarks/watch.py [--config=configs/tiny.py --steps=60 --warm_up=20
    --config.KEY=VALUE ...]

Runs train.py's own loop with a row every step, which is the dearest there is, and reads
`MemoryWatch.seconds_blocked` over the steps after the warm-up. Beside it the census alone is timed
with more arrays alive, as a model whose layers are not stacked has. Prints one JSON object; the run
itself goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

import memory.measure
import train
from config_border import load_config, override
from memory.leaks import LeakWatch
from memory.measure import MemoryWatch

seen: list[dict[str, float]] = []  # after the warm-up and at the end


class Watched(MemoryWatch):
    """Known to this file; reads the clocks after a step."""

    first = last = 0

    def after(self, step: int) -> None:
        super().after(step)
        if step in (self.first, self.last):
            arrays = len(jax.live_arrays())
            clocks = {"watch": self.seconds_blocked, "all": time.perf_counter()}
            seen.append(clocks | {"arrays": arrays})


def census_seconds(arrays: int, times: int = 50) -> float:
    """Median seconds of one look at `arrays` arrays more than there are."""
    zero = jnp.zeros(3)
    kept = [zero + i for i in range(arrays)]
    watch, seconds = LeakWatch(), []
    for _ in range(times):
        since = time.perf_counter()
        watch.look()
        seconds.append(time.perf_counter() - since)
    del kept
    return statistics.median(seconds)


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warm_up", type=int, default=20)
    args, overrides = parser.parse_known_args()
    Watched.first, Watched.last = args.warm_up, args.warm_up + args.steps
    # One more step: the last one is followed by an evaluation.
    fixed = [f"--config.train.steps={Watched.last + 1}", "--config.train.log_every=1"]
    config = override(load_config(args.config), [*fixed, *overrides])
    memory.measure.MemoryWatch = Watched  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        train.main(config, Path(folder))
    seconds = {name: seen[1][name] - seen[0][name] for name in ("watch", "all")}
    result = {
        "config": args.config,
        "overrides": overrides,
        "steps": args.steps,
        "step_seconds": seconds["all"] / args.steps,
        "watch_seconds": seconds["watch"] / args.steps,
        "share": seconds["watch"] / seconds["all"],
        "live_arrays": seen[1]["arrays"],
        "census_seconds": {count: census_seconds(count) for count in (100, 1000, 10000)},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
