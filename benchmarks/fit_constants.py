"""Fits memory/constants.py on compiled cells that are in no published table.

    python benchmarks/fit_constants.py --platform=gpu

Reads benchmarks/results/memory_calibration.jsonl (cells of the seeds 1, 3, 5 and 11), minimises
the squared relative error of the total and of the temporaries, with a pull towards the constants as
they are, and prints them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import differential_evolution  # type: ignore[import-untyped]

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.memory_accuracy import make_job, read_cells  # noqa: E402
from memory.constants import CONSTANTS, Constants  # noqa: E402
from memory.predict import prediction_of  # noqa: E402
from memory.terms import Terms  # noqa: E402
from parallel.targets import parse_target  # noqa: E402

CELLS = ROOT / "benchmarks" / "results" / "memory_calibration.jsonl"
BOUNDS = {
    "logits": (0.8, 1.6),
    "scattered": (0, 3),
    "loss_narrow": (0, 12),
    "gradients_twice": (0, 1),
    "early_gradients": (0, 1),
    "gathered": (0, 6),
    "layer_gradient": (0, 4),
    "wide": (0, 12),
    "narrow": (0, 20),
    "heads": (0, 20),
    "scores": (0, 6),
    "lookup": (0, 6),
    "lookup_narrow": (0, 8),
    "period": (0, 1),
    "regathered": (0, 2),
    "accumulated_twice": (0, 1.5),
    "update": (0, 3),
    "packing": (1, 1.3),
    "on_chip": (0, 120),
}


def main() -> None:
    """Prints the fitted constants and the error before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--platform", choices=("gpu", "tpu"), required=True)
    parser.add_argument("--cells", type=Path, default=CELLS)
    options = parser.parse_args()
    cells = [row for row in read_cells(options.cells) if row["target"].startswith(options.platform)]
    bounds = {n: b for n, b in BOUNDS.items() if n != "on_chip" or options.platform == "tpu"}
    bases = []
    for row in cells:
        job = make_job(row["shape"], row["target"], row["overrides"])
        bases.append(Terms(job, parse_target(row["target"]).chip))
    truth = [row["compiled"] for row in cells]
    now = [getattr(CONSTANTS[options.platform], name) for name in bounds]
    low, high = np.array(list(bounds.values())).T
    width = high - low
    start = np.clip(now, low + 1e-6 * width, high - 1e-6 * width)  # inside, as scipy wants it

    def errors(values: Any) -> tuple[np.ndarray, np.ndarray]:
        constants = Constants(**dict(zip(bounds, map(float, values), strict=True)))
        total, temporaries = [], []
        for base, compiled in zip(bases, truth, strict=True):
            prediction = prediction_of(base, constants)
            total.append(prediction.total_bytes / compiled["total_bytes"] - 1)
            temporaries.append(prediction.temporaries / compiled["temporaries"] - 1)
        return np.array(total), np.array(temporaries)

    def loss(values: Any) -> float:
        total, temporaries = errors(values)
        pull = np.mean(((values - start) / width) ** 2)
        # Beyond a tenth an error counts as its size, so that one odd cell does not rule.
        robust = lambda e: np.mean(np.where(abs(e) < 0.1, e**2, 0.2 * abs(e) - 0.01))
        return float(robust(total) + 0.2 * robust(temporaries) + 1e-3 * pull)

    fitted = differential_evolution(
        loss, list(bounds.values()), seed=0, maxiter=150, popsize=8, x0=start, polish=False
    )
    for name, values in (("before", start), ("after", fitted.x)):
        total, temporaries = (np.abs(e) * 100 for e in errors(values))
        print(
            f"{name}: {len(cells)} cells, total median {np.median(total):.1f}% 95th percentile "
            f"{np.quantile(total, 0.95):.1f}%, temporaries median {np.median(temporaries):.1f}%"
        )
    constants = Constants(
        **{name: round(float(v), 2) for name, v in zip(bounds, fitted.x, strict=True)}
    )
    print(dataclasses.asdict(constants))


if __name__ == "__main__":
    main()
