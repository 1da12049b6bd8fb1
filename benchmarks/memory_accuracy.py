"""Predicted against compiled bytes, on cells drawn by a seed: the table of docs/memory-accuracy/.

    python benchmarks/memory_accuracy.py --compile --seed=2026 --out=docs/memory-accuracy
    python benchmarks/memory_accuracy.py --out=docs/memory-accuracy          # the table again

A cell is a shipped shape on a target with a mesh, a ZeRO level, a remat policy, a precision, a
length and a batch, all drawn. The constants of `memory/` were fitted on cells of other seeds
(benchmarks/results/memory_calibration.jsonl). Needs the extras gpu-target and tpu-target to
compile; cells that are in `cells.jsonl` already are not compiled again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from compile_for import compile_for  # noqa: E402
from config_border import load_config, override  # noqa: E402
from config_types import plain  # noqa: E402
from experiment import read_experiment  # noqa: E402
from parallel.targets import parse_target  # noqa: E402

GPU = ("gpu:h100:1x8", "gpu:h100:2x8", "gpu:h100:8x8", "gpu:h100:64x8")
TPU = ("tpu:v5e:2x4", "tpu:v5e:4x4", "tpu:v5p:2x2x2", "tpu:v5p:4x4x4", "tpu:v6e:2x4", "tpu:v6e:4x4")
SHAPES = ("gpt2_124m", "qwen3_0_6b", "gemma3_1b", "llama3_8b", "llama3_70b")
# Devices from which on a shape is worth drawing: the state alone must fit in a few of them.
LEAST_DEVICES = {"llama3_8b": 8, "llama3_70b": 64}


def draw(rng: random.Random, targets: tuple[str, ...]) -> tuple[str, str, dict[str, Any]] | None:
    """A random cell (shape, target, overrides); None where what was drawn does not exist."""
    target = parse_target(rng.choice(targets))
    shape = rng.choice(SHAPES)
    devices = target.device_count
    if devices < LEAST_DEVICES.get(shape, 1):
        return None
    tensor = rng.choice([n for n in (1, 1, 2, 4, 8) if devices % n == 0])
    data = rng.choice([n for n in (1, 1, 2, 4, 8) if (devices // tensor) % n == 0])
    micro = rng.choice((1, 1, 1, 2, 4))
    rows = rng.choice((1, 1, 2, 4, 8))
    length = rng.choice((1024, 2048, 4096, 8192))
    params, compute = rng.choice(
        (("float32", "bfloat16"),) * 3 + (("bfloat16",) * 2, ("float32",) * 2)
    )
    return (
        shape,
        target.name,
        {
            "mesh.data": data,
            "mesh.fsdp": devices // tensor // data,
            "mesh.tensor": tensor,
            "parallel.zero": rng.choice((3, 3, 2, 1, 0)),
            "parallel.sequence": tensor > 1 and rng.random() < 0.5,
            "remat.policy": rng.choice(("none", "full", "dots", "attention")),
            "precision.params": params,
            "precision.compute": compute,
            "train.grad_accumulation": micro,
            "data.sequence_length": length,
            "data.batch_size": rows * micro * devices // tensor,
        },
    )


def cells(seed: int, count: int, targets: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Cells that exist and whose state and saved activations could fit in the device."""
    from memory.predict import predict

    rng = random.Random(seed)
    found = 0
    while found < count:
        drawn = draw(rng, targets)
        if drawn is None:
            continue
        shape, target, overrides = drawn
        try:
            config = make_config(shape, overrides)
            job = read_experiment(config, parse_target(target).device_count).job()
        except ValueError:  # heads that do not divide, too long a sequence
            continue
        chip = parse_target(target).chip
        if predict(job, chip).total_bytes > 1.2 * chip.memory:
            continue
        found += 1
        yield {"shape": shape, "target": target, "overrides": overrides}


def make_config(shape: str, overrides: dict[str, Any]) -> Any:
    """The config of a cell."""
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    return override(load_config(str(ROOT / "configs" / f"{shape}.py")), flags)
