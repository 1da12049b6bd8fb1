"""The search against exhaustive choice, and predicted against measured order of layouts.

    python benchmarks/search.py --part=compile --cases=20     # about half an hour on two cores
    python benchmarks/search.py --part=run --layouts=12       # about ten minutes; nothing else runs

compile: small cases drawn by a seed on two simulated devices, every layout of each compiled. The
search may compile a quarter of them; found is how its layout's predicted time compares with the
best of all that fit. Then 24 budgets: what is chosen fits, and what is faster does not.

run: layouts of configs/tiny.py on cpu:8 drawn by a seed from the search's own list, each trained by
train.py. Of the pairs whose measured step times differ by more than a fifth: how many are in the
predicted order; and Spearman's rank correlation of all.

Both write benchmarks/results/search.json as they go; what is in it is not done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
DEVICES = 2
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = str(DEVICES)
# The sizes are those of the optimised program; only its machine code is worse.
CHEAP = " --xla_backend_optimization_level=0"

RESULT = ROOT / "benchmarks" / "results" / "search.json"
SEED = 2026
BUDGETS = 24
APART = 1.2  # measured times further apart than this should be in the predicted order


def main() -> None:
    """One part, or both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("compile", "run", "both"), default="both")
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--layouts", type=int, default=12)
    options = parser.parse_args()
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"cases": [], "runs": []}
    if options.part in ("run", "both"):
        run_part(result, options.layouts)
    if options.part in ("compile", "both"):
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + CHEAP
        compile_part(result, options.cases)


def keep(result: dict[str, Any]) -> None:
    """Writes what is known so far."""
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


# --- Compiled: the search against all ------------------------------------------------------------


def draw_case(number: int) -> dict[str, Any]:
    """A small shape by its number: config key -> value."""
    rng = random.Random(f"{SEED} {number}")
    heads = rng.choice((2, 4, 8))
    length = rng.choice((32, 64, 128))
    return {
        "config.model.vocab_size": rng.choice((257, 500, 1000)),
        "config.model.layers": rng.choice((2, 3, 4)),
        "config.model.embed_dim": 8 * heads,
        "config.model.mlp_dim": 8 * heads * rng.choice((2, 3, 4)),
        "config.model.heads": heads,
        "config.model.kv_heads": rng.choice((2, heads)),
        "config.model.head_dim": rng.choice((8, 16)),
        "config.model.gated": rng.random() < 0.5,
        "config.model.max_length": length,
        "config.data.sequence_length": length,
        "config.data.batch_size": DEVICES,  # 32 layouts
        "config.loss.chunk": rng.choice((32, 128)),
        "config.optimizer.name": rng.choice(("adamw", "lion", "sgd")),
    }


def compile_part(result: dict[str, Any], cases: int) -> None:
    """Compiles every layout of each case, then searches and holds it against them."""
    from config_border import load_config, with_values
    from layouts import all_rows, make_job
    from memory.compiled import compile_step
    from parallel.targets import parse_target

    target = parse_target(f"cpu:{DEVICES}")
    for number in range(len(result["cases"]), cases):
        case = draw_case(number)
        config = with_values(load_config(str(ROOT / "configs" / "tiny.py")), case)
        sizes = {
            row["name"]: compile_step(
                make_job(config, target, row["overrides"]), target
            ).total_bytes
            for row in all_rows(config, target, target.chip.memory)
        }
        result["cases"].append({"case": case, "compiled_bytes": sizes})
        keep(result)
        print(f"case {number}: {len(sizes)} layouts", flush=True)
    # Predictions are made now: they cost nothing, and the formulas may have changed since.
    tables = []
    for number, case in enumerate(result["cases"]):
        config = with_values(load_config(str(ROOT / "configs" / "tiny.py")), case["case"])
        tables.append(all_rows(config, target, target.chip.memory))
        rng = random.Random(f"{SEED} budget {number}")
        budget = quantile(sorted(case["compiled_bytes"].values()), rng.uniform(0.15, 0.85))
        case["search"] = held_against_all(tables[-1], case["compiled_bytes"], budget)
    searched = [case["search"] for case in result["cases"]]
    rng = random.Random(f"{SEED} budgets")
    budgets = []
    for number in range(BUDGETS):
        number %= len(tables)
        truth = result["cases"][number]["compiled_bytes"]
        budget = quantile(sorted(truth.values()), rng.uniform(0.05, 0.95))
        budgets.append(held_against_all(tables[number], truth, budget))
    result["budgets"] = budgets
    result["summary"] = result.get("summary", {}) | {
        "cases": len(searched),
        "largest_time_over_best": max(one["time_over_best"] for one in searched),
        "largest_share_compiled": max(one["share_compiled"] for one in searched),
        "budgets": len(budgets),
        "budgets_kept": sum(one["faster_that_fit"] == 0 for one in budgets),
    }
    keep(result)
    print(json.dumps(result["summary"]))


def held_against_all(
    table: list[dict[str, Any]], truth: dict[str, int], budget: int
) -> dict[str, Any]:
    """What a search within a quarter of the compilations finds, and what there was to find.

    Args:
      table: predicted rows.
      truth: compiled bytes by the row's name.
      budget: bytes per device.
    """
    from memory.search import search, with_compiled

    rows = [row | {"limit_bytes": budget} for row in table]
    compiled: list[str] = []

    def compile_rows(some: list[dict[str, Any]]) -> list[dict[str, Any]]:
        compiled.extend(row["name"] for row in some)
        answers = [{"status": "ok", "total_bytes": truth[row["name"]]} for row in some]
        return [with_compiled(row, answer) for row, answer in zip(some, answers, strict=True)]

    found = search(rows, compile_rows, budget=budget, most=max(1, len(rows) // 4))[0]
    fitting = [row["predicted"]["seconds"] for row in rows if truth[row["name"]] <= budget]
    seconds = found["predicted"]["seconds"]
    return {
        "budget": budget,
        "found": found["name"],
        "found_bytes": truth[found["name"]],
        "time_over_best": seconds / min(fitting),
        "faster_that_fit": sum(one < seconds for one in fitting),
        "compilations": len(compiled),
        "share_compiled": len(compiled) / len(rows),
    }


def quantile(values: list[int], share: float) -> int:
    """The value below which about a share of the others lie."""
    return values[int(share * (len(values) - 1))]


# --- Measured: the predicted order ---------------------------------------------------------------


def run_part(result: dict[str, Any], count: int) -> None:
    """Trains layouts of configs/tiny.py drawn by a seed."""
    import run_for
    from config_border import load_config, with_values
    from layouts import all_rows
    from parallel.targets import parse_target

    target = parse_target("cpu:8")
    config = load_config(str(ROOT / "configs" / "tiny.py"))
    rows = all_rows(config, target, target.chip.memory)
    drawn = random.Random(f"{SEED} runs").sample(rows, count)
    with tempfile.TemporaryDirectory() as folder:
        for number, row in enumerate(drawn[len(result["runs"]) :]):
            values = run_for.short(with_values(config, row["overrides"]), Path(folder) / "data")
            workdir = Path(folder) / str(number)
            answer = run_for.start(values, target, workdir, run_for.here)()
            if answer["measured"] is None:
                raise SystemExit(f"{row['name']}: {answer['error']}")
            result["runs"].append(
                {
                    "name": row["name"],
                    "overrides": row["overrides"],
                    "predicted_seconds": row["predicted"]["seconds"],
                    "measured_seconds": answer["measured"]["seconds"],
                }
            )
            keep(result)
            print(f"{row['name']}: {answer['measured']['seconds']:.4f} s", flush=True)
    runs = result["runs"]
    predicted = [run["predicted_seconds"] for run in runs]
    measured = [run["measured_seconds"] for run in runs]
    apart = [
        (one, two)
        for one, two in itertools.combinations(range(len(runs)), 2)
        if max(measured[one], measured[two]) > APART * min(measured[one], measured[two])
    ]
    right = sum(
        (predicted[one] < predicted[two]) == (measured[one] < measured[two]) for one, two in apart
    )
    result["summary"] = result.get("summary", {}) | {
        "runs": len(runs),
        "pairs_apart": len(apart),
        "pairs_in_order": right / len(apart) if apart else None,
        "spearman": spearman(predicted, measured),
    }
    keep(result)
    print(json.dumps(result["summary"]))


def spearman(xs: list[float], ys: list[float]) -> float:
    """The correlation of the ranks (Spearman 1904, https://doi.org/10.2307/1412159)."""
    import numpy as np

    ranks = [np.argsort(np.argsort(values)) for values in (xs, ys)]
    matrix: np.ndarray = np.asarray(np.corrcoef(ranks[0], ranks[1]))
    return float(matrix[0, 1])


if __name__ == "__main__":
    main()
