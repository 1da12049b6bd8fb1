"""What an int8 cache costs in perplexity, on a model trained on real text.

    python train.py --config=configs/tiny.py --workdir=runs/tiny
    python benchmarks/cache_perplexity.py --workdir=runs/tiny

Held-out rows are read token by token through the cache, each token predicted from rounded keys and
values alone, and once more with a cache in the compute dtype. Both see the same tokens.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from config_border import read_config
from data.loader import device_batches
from experiment import read_experiment
from models.decode import make_decoding, weights_of
from models.kv_cache import CacheShape
from parallel.mesh import make_mesh
from run_params import saved_params

RESULTS = Path(__file__).parent / "results" / "cache_perplexity.json"
BEGIN = 8  # tokens of a row that are read at once


def main() -> None:
    """Both caches, the ratio of their perplexities."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=4, help="of the run's batch size")
    options = parser.parse_args()
    experiment = read_experiment(read_config(options.workdir), jax.device_count(), training=False)
    experiment = replace(experiment, data=replace(experiment.data, packing="none"))
    mesh = make_mesh(experiment.mesh)
    result: dict[str, Any] = {"config": str(options.workdir.name), "jax": jax.__version__}
    with jax.set_mesh(mesh):
        model = experiment.build_model()
        params, step, _ = saved_params(experiment, model, mesh, options.workdir, None, None)
        compute = experiment.precision.compute
        weights = weights_of(params, model.axes, model.rules, compute)
        rows, length = experiment.data.batch_size, experiment.data.sequence_length
        data = experiment.open_data(options.workdir)
        with data.held_out(options.batches) as loader:
            batches = list(device_batches(loader, mesh, model.rules.spec("batch seq")))
        for name, int8 in ((compute, False), ("int8", True)):
            shape = CacheShape(rows, length, int8=int8)
            decoding = make_decoding(experiment.model, model.rules, shape, compute)
            total = count = 0.0
            begin = jax.jit(decoding.begin, donate_argnums=1)
            go_on = jax.jit(decoding.go_on, donate_argnums=1)
            for batch in batches:
                cache = jax.jit(decoding.empty)()
                tokens = batch["tokens"]
                ones = jnp.ones_like(tokens[:, 0])
                start = {"tokens": tokens[:, :BEGIN]}
                cache, _ = begin(weights, cache, start, ones * BEGIN)
                for at in range(BEGIN, length):
                    cache, logits = go_on(weights, cache, tokens[:, at : at + 1], ones * at, ones)
                    there = np.asarray(batch["segments"][:, at]) > 0
                    p = jax.nn.log_softmax(logits)
                    nll = -np.take_along_axis(
                        np.asarray(p), np.asarray(batch["targets"])[:, at : at + 1], 1
                    )[:, 0]
                    total += float(nll[there].sum())
                    count += float(there.sum())
            loss = total / count
            result[name] = {"loss": loss, "perplexity": math.exp(loss), "tokens": int(count)}
            print(name, result[name], flush=True)
    ratio = result["int8"]["perplexity"] / result[compute]["perplexity"]
    result |= {"step": step, "ratio": ratio}
    print(f"int8 / {compute}: {ratio:.6f}")
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
