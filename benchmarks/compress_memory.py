"""What making a model smaller holds in memory at its peak, and how long it takes.

    python train.py --config=configs/gpt2_124m.py --workdir=runs/gpt2 --config.train.steps=1
    python -m benchmarks.compress_memory --workdir=runs/gpt2

Each method is the command that a person runs; its process is sampled from outside (Linux's RssAnon:
memory that is no file's). It is compared with a process that reads the model and does nothing with
it: what is beyond that are programs, calibration text and one layer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

from compressing import opened
from config_border import read_config

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compress_memory.json"
MIB, EVERY = 2**20, 0.02
CALIBRATED = ["--rows=32", "--config.data.sequence_length=128"]
METHODS: dict[str, list[str]] = {
    "int4:128 to nearest": ["quantize", "--form=int4:128"],
    "int4:128 by GPTQ": ["quantize", "--form=int4:128", "--method=gptq", *CALIBRATED],
    "half zeros by magnitude": ["prune", "--method=magnitude"],
    "half zeros by SparseGPT": ["prune", "--method=sparsegpt", *CALIBRATED],
}


def peak(arguments: list[str]) -> dict[str, float]:
    """The most anonymous memory of a process, in MiB, and its seconds."""
    began, most = time.perf_counter(), 0
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon"):
                most = max(most, int(line.split()[1]) * 1024)
        time.sleep(EVERY)
    assert process.returncode == 0, arguments
    return {"peak_mib": most / MIB, "seconds": time.perf_counter() - began}


def read_alone(workdir: Path) -> None:
    """Opens the run as every method does, in this process."""
    with opened(read_config(workdir), workdir, None, workdir / "nowhere") as run:
        jax.block_until_ready(run.params)
        print(sum(a.nbytes for a in jax.tree.leaves(run.params)))


def main() -> None:
    """Reading alone, then every method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--read", action="store_true", help="read the run in this process and end")
    options = parser.parse_args()
    workdir = options.workdir.resolve()
    if options.read:
        read_alone(workdir)
        return
    flag = f"--workdir={workdir}"
    alone = peak(["-m", "benchmarks.compress_memory", flag, "--read"])
    with opened(read_config(workdir), workdir, None, workdir / "nowhere") as run:
        model, config = sum(a.nbytes for a in jax.tree.leaves(run.params)), run.experiment.model
    D, F = config.embed_dim, config.feed_forward_dim
    found: dict[str, Any] = {
        "jax": jax.__version__,
        "model_mib": model / MIB,
        # Sums of four inputs in float32, here and on the host, the solver's float64 matrix of the
        # widest, and a layer's weights.
        "layer_mib": (8 * (3 * D * D + F * F) + 8 * F * F + 4 * (4 * D * D + 2 * D * F)) / MIB,
        "reading_alone": alone,
        "methods": {},
    }
    print(json.dumps(found), flush=True)
    with TemporaryDirectory(dir=workdir.parent) as scratch:
        for name, (method, *flags) in METHODS.items():
            out = Path(scratch) / name.replace(" ", "-").replace(":", "-")
            row = peak(["-m", "compress", method, flag, f"--out={out}", *flags])
            row["beyond_reading_mib"] = row["peak_mib"] - alone["peak_mib"]
            found["methods"][name] = row
            print(json.dumps({name: row}), flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
