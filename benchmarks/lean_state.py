"""What a smaller training state costs in held-out bits per byte, on real text.

    JAX_PLATFORMS=cpu python benchmarks/lean_state.py [--seeds=3] [--steps=250] [NAME ...]

Trains configs/tiny.py (0.95 million parameters) on the Python standard library, each optimizer
for as many steps on the same batches, and evaluates the last parameters. A seed is that of the
parameters and of the order of the data. Bytes are those of the optimizer's state on one device,
for each parameter. Results in results/lean_state.json are kept, others are added.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

RESULT = ROOT / "benchmarks" / "results" / "lean_state.json"
SHAPE = (
    *("data.batch_size=8", "eval.batches=64", "optimizer.warmup_steps=20"),
    # Down to 0, so that less of what is left is the noise of the last steps.
    *("optimizer.learning_rate=2e-3", "optimizer.final_fraction=0"),
    *("logging.tensorboard=False", "memory.check=off"),
)
CASES = {
    "adamw": (),
    "adamw8bit": ("optimizer.name=adamw8bit",),
    "adamw4bit": ("optimizer.name=adamw4bit",),
    "adafactor": ("optimizer.name=adafactor",),
    # Of matrices of 128 to 384; at AdamW's rate, so without the 0.25 of GaLore's higher one.
    "galore": (
        *("optimizer.name=galore", "optimizer.rank=32", "optimizer.refresh=50"),
        "optimizer.projection_scale=1",
    ),
    "apollo": ("optimizer.name=apollo", "optimizer.rank=32", "optimizer.refresh=50"),
    "bfloat16, rounded by chance": (
        *("precision.params=bfloat16", "optimizer.stochastic_rounding=True"),
    ),
    "bfloat16, rounded to nearest": ("precision.params=bfloat16",),
}


def flags(case: str, seed: int, steps: int) -> list[str]:
    """What train.py is told besides the config file."""
    changes = (*SHAPE, *CASES[case], f"seed={seed}", f"train.steps={steps}")
    return [f"--config.{change}" for change in changes]


def trained(case: str, seed: int, steps: int) -> float:
    """Held-out bits per byte of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--config=configs/tiny.py", f"--workdir={folder}"]
        command += flags(case, seed, steps)
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"})
        last = (Path(folder) / "metrics.jsonl").read_text().splitlines()[-1]
    return float(json.loads(last)["eval_bits_per_byte"])


def state_bytes(case: str) -> dict[str, float]:
    """Bytes of master copy and of optimizer state, for each parameter."""
    import jax

    from config_border import load_config, override
    from experiment import read_experiment
    from parallel.mesh import make_mesh
    from training.optim import make_optimizer
    from training.state import abstract_params, count_of

    config = override(load_config(str(ROOT / "configs/tiny.py")), flags(case, 0, 1))
    experiment = read_experiment(config, 1)
    with jax.set_mesh(make_mesh(experiment.mesh, jax.devices()[:1])):
        model = experiment.build_model()
        params = abstract_params(model, experiment.precision)
        optimizer = make_optimizer(experiment.optimizer, 1, model.axes)
        state = jax.eval_shape(optimizer.init, params)
    held = {"params": params, "optimizer": state}
    sums = {
        name: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(held[name])) for name in held
    }
    return {name: round(total / count_of(params), 3) for name, total in sums.items()}


def summary(found: dict[str, Any]) -> None:
    """Adds what each case loses against AdamW on the same seeds, and prints it."""
    base = found["adamw"]["bits_per_byte"]
    for case, row in found.items():
        seeds = [seed for seed in row["bits_per_byte"] if seed in base]
        if not seeds:
            continue
        ours, theirs = (mean(values[s] for s in seeds) for values in (row["bits_per_byte"], base))
        row["percent_more"] = round(100 * (ours / theirs - 1), 3)
        print(
            f"{case:30} {row['bytes']['optimizer']:6.3f} bytes a parameter, {ours:.4f} bits per "
            f"byte over {len(seeds)} seeds, {row['percent_more']:+.2f}%"
        )


def main() -> None:
    """Runs what is not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="NAME", help="all if none is named")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for case in options.cases or CASES:
        for seed in range(options.seeds):
            row = found.setdefault(case, {"flags": list(CASES[case]), "bits_per_byte": {}})
            if str(seed) in row["bits_per_byte"]:
                continue
            row["bytes"], row["steps"] = state_bytes(case), options.steps
            row["bits_per_byte"][str(seed)] = round(trained(case, seed, options.steps), 5)
            RESULT.write_text(json.dumps(found, indent=1) + "\n")
            print(case, seed, row["bits_per_byte"][str(seed)], flush=True)
    summary(found)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
