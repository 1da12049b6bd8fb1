"""The loop of train.py keeps nothing from step to step: arrays, memory, threads, compilations."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.processes import ROOT
from tests.runs import arguments, environment, write_texts

# A save under way moves RSS by up to 3 MiB. Over 300 steps that is as much as what is looked for, a
# leak of 1 MiB in 100 steps; over 900 it is a third.
WARM_UP, STEPS, EACH = 400, 900, 10

# train.py, looked at from inside when a step hands its metrics over, in a process of its own: what
# other tests leave in memory is not counted.
WATCHED = """
import ctypes, gc, json, sys, threading
import jax, psutil
import cli, train
from training.metrics import Metrics

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else 0
)
first, each, *argv = sys.argv[1:]
push, process = Metrics.push, psutil.Process()

def watch(self, step, metrics):
    push(self, step, metrics)
    if step >= int(first) and step % int(each) == 0:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator has free and keeps is no leak
        counts = {"arrays": len(jax.live_arrays()), "threads": threading.active_count()}
        counts |= {"compiled": len(compiled), "rss": process.memory_info().rss}
        print("seen", json.dumps(counts), flush=True)

Metrics.push = watch
cli.run(train.main, name="train.py", about="", config_from="file", argv=argv)
"""


@pytest.mark.slow
def test_nine_hundred_steps_leave_nothing(tmp_path):
    command = arguments(
        tmp_path / "run",
        write_texts(tmp_path / "texts"),
        mesh__data=1,
        mesh__fsdp=2,
        train__steps=WARM_UP + STEPS + 1,
        train__log_every=10,
        checkpoint__every=60,
        eval__every=70,
        logging__tensorboard=True,
    )
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(WARM_UP), str(EACH), *command],
        cwd=ROOT,
        env=environment(devices=2),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("seen ")]
    seen = [json.loads(line.removeprefix("seen ")) for line in lines]
    assert len(seen) == STEPS // EACH + 1
    for name in ("arrays", "compiled"):
        assert len({counts[name] for counts in seen}) == 1, (name, seen)
    # A save under way takes threads and some MiB for a while; a leak raises the least there is.
    threads = [counts["threads"] for counts in seen]
    assert min(threads[-10:]) == min(threads[:10]), threads
    rss = [counts["rss"] / 2**20 for counts in seen]
    grown = min(rss[-10:]) - min(rss[:10])
    print(f"RSS grew by {grown:.2f} MiB in {STEPS - 10 * EACH} steps")
    assert grown < (STEPS - 10 * EACH) / 100, rss
