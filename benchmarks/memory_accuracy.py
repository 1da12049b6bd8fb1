"""Predicted against compiled bytes, on cells drawn by a seed: the table of docs/memory-accuracy/.

    python benchmarks/memory_accuracy.py --compile --seed=7 --out=docs/memory-accuracy
    python benchmarks/memory_accuracy.py --out=docs/memory-accuracy          # the table again

A cell is a shipped shape on a target with a mesh, a ZeRO level, a remat policy, a precision, a
length and a batch, all drawn. The constants of `memory/` were fitted on cells of other seeds
(benchmarks/results/memory_calibration.jsonl). Needs the extras gpu-target and tpu-target to
compile; cells that are in `cells.jsonl` already are not compiled again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from compile_for import compile_for  # noqa: E402
from config_border import load_config, override  # noqa: E402
from config_types import plain  # noqa: E402
from experiment import read_experiment  # noqa: E402
from memory.job import Job  # noqa: E402
from memory.predict import predict  # noqa: E402
from memory.terms import Terms  # noqa: E402
from parallel.targets import parse_target  # noqa: E402

GPU = ("gpu:h100:1x8", "gpu:h100:2x8", "gpu:h100:8x8", "gpu:h100:64x8")
TPU = ("tpu:v5e:2x4", "tpu:v5e:4x4", "tpu:v5p:2x2x2", "tpu:v5p:4x4x4", "tpu:v6e:2x4", "tpu:v6e:4x4")
# Gemma's pattern of six layers takes the compilers ten times as long: drawn half as often.
SHAPES = ("gpt2_124m", "qwen3_0_6b", "llama3_8b", "llama3_70b") * 2 + ("gemma3_1b",)
# What is kept of a compiler's answer.
SIZES = (
    *("status", "error", "total_bytes", "arguments", "outputs", "temporaries", "aliases", "code"),
    *("host_bytes", "lower_seconds", "compile_seconds", "out_of_memory"),
)
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
    length = 1024 if shape == "gpt2_124m" else rng.choice((1024, 2048, 4096, 8192))
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
    """Cells that exist and whose state, gradients and saved activations could fit the device.

    Those are exact, so that what is drawn does not change with a fitted constant.
    """
    rng = random.Random(seed)
    found = 0
    while found < count:
        drawn = draw(rng, targets)
        if drawn is None:
            continue
        shape, target, overrides = drawn
        try:
            job = make_job(shape, target, overrides)
        except ValueError:  # heads that do not divide, too long a sequence
            continue
        chip = parse_target(target).chip
        terms = Terms(job, chip)
        stored = (
            terms.master
            + sum(sum(parts) for parts in terms.moments.values())
            + terms.copy
            + terms.accumulated
            + terms.layer_gradients
            + terms.outer_gradients
            + sum(terms.saved.values())
        )
        if stored <= 1.1 * chip.memory:
            found += 1
            yield {"shape": shape, "target": target, "overrides": overrides}


def make_config(shape: str, overrides: dict[str, Any]) -> Any:
    """The config of a cell."""
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    return override(load_config(str(ROOT / "configs" / f"{shape}.py")), flags)


def make_job(shape: str, target: str, overrides: dict[str, Any]) -> Job:
    """The job of a cell."""
    count = parse_target(target).device_count
    return read_experiment(make_config(shape, overrides), count).job()


def compile_cells(todo: list[dict[str, Any]], file: Path, timeout: float) -> None:
    """Compiles the cells one after another and appends each to `file`."""
    for cell in todo:
        config = plain(make_config(cell["shape"], cell["overrides"]))
        compiled = compile_for(config, parse_target(cell["target"]), timeout=timeout)
        kept = {name: compiled[name] for name in SIZES if name in compiled}
        with file.open("a") as out:
            out.write(json.dumps(cell | {"compiled": kept}) + "\n")
        size = compiled.get("total_bytes", 0) / 2**30
        print(cell["target"], cell["shape"], compiled["status"], f"{size:.2f} GiB", flush=True)


def read_cells(file: Path) -> list[dict[str, Any]]:
    """The cells of a file, those whose compilation failed left out."""
    if not file.is_file():
        return []
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row for row in rows if row["compiled"]["status"] != "failed"]


@dataclass(frozen=True)
class Error:
    """Predicted over compiled, less one; the phase that decides by prediction."""

    cell: dict[str, Any]
    total: float
    temporaries: float
    arguments: float
    phase: str
    predicted: int
    limit: int

    @property
    def wrongly_fits(self) -> bool:
        """Predicted to fit with a tenth of the device to spare; the compiler says it does not."""
        compiled = self.cell["compiled"]
        too_large = compiled["total_bytes"] > self.limit or compiled["out_of_memory"]
        return self.predicted <= 0.9 * self.limit and too_large


def errors(rows: list[dict[str, Any]]) -> list[Error]:
    """The error of every cell, with the constants as they are now."""
    found = []
    for row in rows:
        chip, compiled = parse_target(row["target"]).chip, row["compiled"]
        prediction = predict(make_job(row["shape"], row["target"], row["overrides"]), chip)
        found.append(
            Error(
                row,
                prediction.total_bytes / compiled["total_bytes"] - 1,
                prediction.temporaries / max(1, compiled["temporaries"]) - 1,
                prediction.arguments / max(1, compiled["arguments"]) - 1,
                max(prediction.phases, key=lambda phase: prediction.phases[phase]),
                prediction.total_bytes,
                chip.memory,
            )
        )
    return found


def summary(found: list[Error]) -> dict[str, Any]:
    """Median and 95th percentile of the errors' sizes, in per cent."""
    total = sorted(abs(e.total) for e in found)
    temporaries = sorted(abs(e.temporaries) for e in found)
    heavy = [
        e
        for e in found
        if e.cell["compiled"]["temporaries"] >= 0.5 * e.cell["compiled"]["total_bytes"]
    ]
    return {
        "cells": len(found),
        "mostly_temporaries": len(heavy),
        "total_median": 100 * statistics.median(total),
        "total_p95": 100 * total[math.ceil(0.95 * len(total)) - 1],
        "temporaries_median": 100 * statistics.median(temporaries),
        "wrongly_fits": sum(e.wrongly_fits for e in found),
    }


def markdown(found: list[Error]) -> str:
    """The table, worst cells first."""
    lines = ["# Predicted against compiled bytes", "", SOURCE, ""]
    groups: dict[str, list[Error]] = {"all": found}
    for error in found:
        groups.setdefault(error.cell["target"].rpartition(":")[0], []).append(error)
    for error in sorted(found, key=lambda e: e.phase):
        groups.setdefault(f"{error.phase} decides", []).append(error)
    head = "| cells | number | temporaries at least half | median | 95th percentile | "
    lines += [head + "median of temporaries | wrongly said to fit |", "| --- |" + " --- |" * 6]
    for name, group in groups.items():
        s = summary(group)
        lines.append(
            f"| {name} | {s['cells']} | {s['mostly_temporaries']} | {s['total_median']:.1f}% | "
            f"{s['total_p95']:.1f}% | {s['temporaries_median']:.1f}% | {s['wrongly_fits']} |"
        )
    lines += [
        "",
        "| target | shape | layout | predicted GiB | compiled GiB | error | temporaries |",
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for e in sorted(found, key=lambda e: -abs(e.total)):
        row, compiled = e.cell, e.cell["compiled"]
        lines.append(
            f"| {row['target']} | {row['shape']} | {layout(row['overrides'])} | "
            f"{e.predicted / 2**30:.2f} | {compiled['total_bytes'] / 2**30:.2f} | "
            f"{100 * e.total:+.1f}% | {100 * e.temporaries:+.1f}% |"
        )
    return "\n".join(lines) + "\n"


def layout(overrides: dict[str, Any]) -> str:
    """A cell's overrides in a few words."""
    o = overrides
    sequence = " sequence" if o["parallel.sequence"] else ""
    return (
        f"data {o['mesh.data']} fsdp {o['mesh.fsdp']} tensor {o['mesh.tensor']}{sequence}, zero "
        f"{o['parallel.zero']}, remat {o['remat.policy']}, {o['precision.params']}/"
        f"{o['precision.compute']}, {o['data.batch_size']} x {o['data.sequence_length']}, "
        f"{o['train.grad_accumulation']} micro-steps"
    )


SOURCE = (
    "Written by `python benchmarks/memory_accuracy.py --out=docs/memory-accuracy`; every cell's "
    "raw figures are in cells.jsonl. Bytes per device; the compiler's are arguments + outputs + "
    "temporaries - aliases. Where it refused a program for want of memory, its own figure of the "
    "temporaries counts; cells on which a compiler itself failed are in the file and not here. The "
    "fitted constants have seen none of these cells."
)


def main() -> None:
    """Draws, compiles what is missing, writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--gpu", type=int, default=96, help="cells on GPU")
    parser.add_argument("--tpu", type=int, default=30, help="cells on TPU")
    parser.add_argument("--compile", action="store_true", help="compile the cells not yet there")
    parser.add_argument("--only", choices=("gpu", "tpu"), help="compile for these alone")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for one compilation")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "cells.jsonl"
    if options.compile:
        done = [row | {"compiled": None} for row in read_cells(file)]
        for kind, count, targets in (("gpu", options.gpu, GPU), ("tpu", options.tpu, TPU)):
            if options.only in (None, kind):
                drawn = cells(options.seed, count, targets)
                todo = [cell for cell in drawn if cell | {"compiled": None} not in done]
                compile_cells(todo, file, options.timeout)
    found = errors(read_cells(file))
    (options.out / "README.md").write_text(markdown(found))
    (options.out / "summary.json").write_text(json.dumps(summary(found), indent=1) + "\n")
    print(json.dumps(summary(found)))


if __name__ == "__main__":
    main()
