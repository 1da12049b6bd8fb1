"""What training with zeros gives back to a pruned model.

    python train.py --config=benchmarks/dense.py --workdir=runs/dense
    python -m benchmarks.recovery --dense=runs/dense --runs=runs/recovery

Each arm prunes the dense model (or leaves it as it is: what more training alone gives), trains it
for the same steps on the same batches with `config.sparsity.hold`, and is evaluated before and
after. Every step is a command of its own, as in docs/pruning.md; a second call goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "recovery.json"
STEPS, RATE = 100, 5e-4
ARMS: dict[str, list[str]] = {
    "dense": [],
    "sparsegpt 50%": ["--method=sparsegpt", "--sparsity=0.5"],
    "magnitude 50%": ["--method=magnitude", "--sparsity=0.5"],
    "sparsegpt 2:4": ["--method=sparsegpt", "--pattern=2:4"],
    "sparsegpt 75%": ["--method=sparsegpt", "--sparsity=0.75"],
}


def command(*arguments: str) -> str:
    """Runs one command of this repository and returns what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def bits_per_byte(workdir: Path) -> float:
    """Held-out, of a run's newest step."""
    printed = command("evaluate.py", f"--workdir={workdir}", "--config.eval.batches=64")
    return float(json.loads(printed.splitlines()[-1])["bits_per_byte"])


def main() -> None:
    """All arms, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--arms", type=int, default=len(ARMS), help="the first of them")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    dense, runs = options.dense.resolve(), options.runs.resolve()
    found: dict[str, Any] = {
        "jax": jax.__version__,
        "steps": STEPS,
        "learning_rate": RATE,
        "dense": bits_per_byte(dense),
        "arms": [],
    }
    for name, how in list(ARMS.items())[: options.arms]:
        folder = runs / name.replace(" ", "-").replace("%", "").replace(":", "")
        pruned = folder / "pruned" if how else dense
        if how and not pruned.is_dir():
            command("-m", "compress", "prune", f"--workdir={dense}", f"--out={pruned}", *how)
        given = {
            "init_from": pruned,
            "sparsity.hold": bool(how),
            "train.steps": STEPS,
            "optimizer.learning_rate": RATE,
            "optimizer.warmup_steps": 10,
            "data.cache": dense / "cache",
            "seed": 1,  # not the order of batches that the dense model was trained in
            "checkpoint.every": STEPS,
        }
        keys = [f"--config.{key}={value}" for key, value in given.items()]
        trained = folder / "trained"
        command("train.py", "--config=benchmarks/dense.py", f"--workdir={trained}", *keys)
        row = {"arm": name, "before": bits_per_byte(pruned), "after": bits_per_byte(trained)}
        row |= {f"{key}_of_dense": row[key] / found["dense"] - 1 for key in ("before", "after")}
        print(json.dumps(row), flush=True)
        found["arms"].append(row)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
