"""Runs train.py and evaluate.py as a user does, on a model whose step takes milliseconds."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import tiny
from tests.processes import ROOT

WORDS = ["mesh", "shard", "tensor", "loss", "gradient", "step", "batch", "token", "layer"]

STEPS, EVERY = 24, 4  # of the small run, and from one checkpoint to the next


def get_config() -> ConfigDict:
    """The small run: configs/tiny.py made smaller. This file is what the tests give as --config.

    It has dropout, clipping and a warm-up, so that a resumed run has something to get wrong. The
    rate is constant after it: how long the run is to be changes nothing in its first steps.
    """
    config = tiny.get_config().unlock()
    config.model.vocab_size = 257
    config.model.layers = 2
    config.model.embed_dim = 32
    config.model.mlp_dim = 64
    config.model.head_dim = 4
    config.model.max_length = 32
    config.model.dropout = 0.1
    config.data.source = "text"
    config.data.tokenizer = "bytes"
    config.data.sequence_length = 32
    config.data.batch_size = 8
    config.optimizer.warmup_steps = 8
    config.optimizer.schedule = "constant"
    config.loss.chunk = 64
    config.train.steps = STEPS
    config.train.log_every = 1
    config.checkpoint.every = EVERY
    config.eval.batches = 2
    config.logging.tensorboard = False
    return config


def write_texts(folder: Path, files: int = 24) -> str:
    """Fills `folder` with the same small texts every time; the glob that finds them."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    for number in range(files):
        words = rng.choices(WORDS, k=rng.randint(40, 160))
        (folder / f"{number:02}.txt").write_text(" ".join(words) + "\n")
    return f"{folder}/*.txt"


def arguments(workdir: Path, texts: str, **keys: Any) -> list[str]:
    """train.py's arguments for the small run; `model__layers=3` overrides `config.model.layers`."""
    given = {"data.path": texts} | {key.replace("__", "."): value for key, value in keys.items()}
    overrides = [f"--config.{key}={value}" for key, value in given.items()]
    return [f"--config={__file__}", f"--workdir={workdir}", *overrides]


def environment(devices: int, compiled: Path | None = None) -> dict[str, str]:
    """Variables for a process of `devices` CPU devices; without `compiled` it keeps no programs."""
    mine = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    mine["JAX_ENABLE_COMPILATION_CACHE"] = "false" if compiled is None else "true"
    return os.environ | mine | ({"JAX_COMPILATION_CACHE_DIR": str(compiled)} if compiled else {})


def start(
    program: str, *argv: object, devices: int = 1, compiled: Path | None = None
) -> subprocess.Popen:
    """Starts `train.py` or `evaluate.py`; `compiled` keeps programs from one run to the next."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / program), *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(devices, compiled),
    )


def finish(process: subprocess.Popen, code: int = 0, timeout: float = 180) -> tuple[str, str]:
    """Its stdout and stderr, once it has ended with `code`."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == code, (process.returncode, out[-2000:], err[-4000:])
    return out, err


def rows(workdir: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`; a line that is being written is left out."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines(True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(workdir: Path) -> dict[int, float]:
    """Loss by step; every step is there once, in order."""
    steps = [row["step"] for row in rows(workdir)]
    assert steps == list(range(1, len(steps) + 1))
    return {row["step"]: row["loss"] for row in rows(workdir)}


def wait_until(
    process: subprocess.Popen,
    condition: Callable[[], Any],
    pause: float = 0.002,
    timeout: float = 120,
) -> None:
    """Returns when `condition()` holds; the process must live until then."""
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it did not come to pass in time"
        time.sleep(pause)


def saved_steps(workdir: Path) -> list[int]:
    """The steps of whole checkpoints."""
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdecimal())
