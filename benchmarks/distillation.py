"""A student with a teacher against the same student without one: equal steps, data and seeds.

    python benchmarks/distillation.py --runs=runs/distillation

The teacher is configs/tiny.py at half its batch, trained for longer; the student has half of its
layers and width, and half of that batch. Each student sees the same batches twice: once with
`config.distill`, once by cross-entropy alone. What is compared is held-out bits per byte of text,
by cross-entropy on both sides. Weight and temperature were set beforehand and not tuned.

Each run is `train.py` in a process of its own, one after the other; a second call goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "distillation.json"
TEACHER_STEPS, STEPS = 600, 300
SEEDS = (1, 2, 3)
TEACHER = {"data.batch_size": 32, "eval.batches": 64, "train.steps": TEACHER_STEPS}
STUDENT = {
    "data.batch_size": 16,
    "eval.batches": 128,
    "model.layers": 2,
    "model.embed_dim": 64,
    "model.mlp_dim": 192,
    "model.head_dim": 8,
    "train.steps": STEPS,
}
ARMS: dict[str, dict[str, Any]] = {
    "alone": {},
    "forward": {"distill.kind": "forward", "distill.weight": 0.7, "distill.temperature": 1.0},
}


def train(workdir: Path, cache: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """Runs train.py and returns what its last row says, with the command's keys."""
    given = {"data.cache": cache, "logging.tensorboard": "false"} | keys
    flags = [f"--config.{key}={value}" for key, value in given.items()]
    command = [sys.executable, str(ROOT / "train.py"), "--config=configs/tiny.py"]
    subprocess.run(
        [*command, f"--workdir={workdir}", *flags], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[-1])
    return {
        "bits_per_byte": row["eval_bits_per_byte"],
        "held_out_loss": row["eval_loss"],
        "step_seconds": row["step_seconds"],
        "keys": {key: str(value) for key, value in keys.items() if "teacher" not in key},
    }


def main() -> None:
    """The teacher, then each arm of each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--weight", type=float, help="instead of the arm's: to choose one")
    parser.add_argument("--temperature", type=float, help="the same")
    options = parser.parse_args()
    runs = options.runs.absolute()
    cache = runs / "data"
    result: dict[str, Any] = {
        "command": "python benchmarks/distillation.py --runs=runs/distillation",
        "config": "configs/tiny.py",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "teacher": train(runs / "teacher", cache, TEACHER),
    }
    print("teacher", result["teacher"]["bits_per_byte"], flush=True)
    chosen = {
        f"distill.{key}": value
        for key in ("weight", "temperature")
        if (value := getattr(options, key)) is not None
    }
    result["students"] = []
    for seed in options.seeds:
        row: dict[str, Any] = {"seed": seed}
        for arm, keys in ARMS.items():
            keys = keys | chosen | {"distill.teacher": runs / "teacher"} if keys else {}
            name = "-".join([arm, *(f"{value}" for value in chosen.values() if keys), str(seed)])
            row[arm] = train(runs / name, cache, STUDENT | {"seed": seed} | keys)
            print(seed, arm, row[arm]["bits_per_byte"], flush=True)
        result["students"].append(row)
    rows = result["students"]
    for arm in list(ARMS)[1:]:
        wins = sum(row[arm]["bits_per_byte"] < row["alone"]["bits_per_byte"] for row in rows)
        result[f"{arm} wins"] = f"{wins} of {len(rows)}"
        print(f"{arm} beats alone on {wins} of {len(rows)} seeds")
    if not chosen and tuple(options.seeds) == SEEDS:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
