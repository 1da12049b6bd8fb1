"""Decoding of GPT-2 124M's shape with weights in other forms, against float32 and bfloat16.

    python -m benchmarks.compressed_decode [--rounds=5]

Weights are drawn; a step adds a token to each row. Forms take turns, so that a busy machine slows
all of them; figures are medians over rounds of the time of a step, and of its ratio to float32's in
the same round. Beside them are the bytes of weights that a step reads, and what they would take at
the bandwidth of the machine, measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.decode_profile import bandwidth
from config_border import load_config, override
from experiment import read_experiment
from models.decode import make_decoding, weights_of
from models.kv_cache import CacheShape
from parallel.mesh import make_mesh
from training.state import drawn_params
from training.stored import WeightsConfig, stored

RESULTS = Path(__file__).parent / "results" / "compressed_decode.json"
FORMS = ("float32", "bfloat16", "int8", "int8+int8", "int4:128")
SLOTS, STEPS = 128, 8


def main() -> None:
    """Every form, for one row and for eight."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    config = override(load_config("configs/gpt2_124m.py"), ["--config.mesh.data=1"])
    experiment = read_experiment(config, 1, training=False)
    mesh = make_mesh(experiment.mesh, jax.devices()[:1])
    result: dict[str, Any] = {
        "jax": jax.__version__,
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    with jax.set_mesh(mesh):
        result["bandwidth"] = bandwidth()  # GB/s
        for rows in (1, 8):
            steps = {form: step_of(experiment, form, rows) for form in FORMS}
            times: dict[str, list[float]] = {form: [] for form in FORMS}
            for _ in range(options.rounds):
                for form, (run, _) in steps.items():
                    times[form].append(run())
            for form in FORMS:
                ratios = [f / t for f, t in zip(times["float32"], times[form], strict=True)]
                size = steps[form][1]
                row = {
                    "milliseconds": 1e3 * statistics.median(times[form]),
                    "speed_of_float32": statistics.median(ratios),
                    "range": [min(ratios), max(ratios)],
                    "weight_mib": size / 2**20,
                    "milliseconds_at_bandwidth": size / 1e6 / result["bandwidth"],
                }
                result[f"{form}, {rows} rows"] = row
                print(form, rows, json.dumps(row), flush=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def step_of(experiment: Any, form: str, rows: int) -> tuple[Any, int]:
    """(what runs some steps and gives the seconds of one, bytes of weights)."""
    model = experiment.build_model()
    compute = form if form in ("float32", "bfloat16") else "float32"
    if form != compute:
        model = stored(model, WeightsConfig({"stack/*": form}))
    params = drawn_params(model, experiment.precision, 0)
    weights = weights_of(params, model.axes, model.rules, compute)
    decoding = make_decoding(experiment.model, model.rules, CacheShape(rows, SLOTS), compute)
    cache = jax.jit(decoding.empty)()
    go_on = jax.jit(decoding.go_on, donate_argnums=1)
    ones = jnp.ones(rows, jnp.int32)
    token = jnp.ones((rows, 1), jnp.int32)
    state = [go_on(weights, cache, token, ones * 64, ones)[0]]  # compiled

    def run() -> float:
        began = time.perf_counter()
        for at in range(STEPS):
            state[0], logits = go_on(weights, state[0], token, ones * (64 + at), ones)
        jax.block_until_ready(logits)
        return (time.perf_counter() - began) / STEPS

    run()
    return run, sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(weights))


if __name__ == "__main__":
    main()
