"""Every family learns its objective on real data: train.py as it is, against the best constant.

    JAX_PLATFORMS=cpu python benchmarks/learning.py [CASE ...]

Each case is a shipped config with a few keys changed, trained by a process of its own that compiles
anew. Kept of each: its seconds (that whole process), its curve, the held-out loss that it reports,
and beside it the loss on the same rows of the best predictor that does not look at what it is given
(`constant.py`), fitted on the rows that the run was trained on. Where rows have an image or a
source, `shuffled` is the held-out loss when each row is given that of another.

Cases in results/learning.json are not run again unless they are named. Draws docs/learning.svg.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.constant import constant_losses, counted_of  # noqa: E402
from benchmarks.learning_cases import CASES, RUNS, Case  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "learning.json"
PICTURE = ROOT / "docs" / "learning.svg"
POINTS = 40  # of a curve
SHUFFLES = 3  # whose mean is taken
WIDE = 20  # from this fall on a curve is drawn on a logarithmic scale

Batch = dict[str, np.ndarray]


# --- A run ----------------------------------------------------------------------------------------


def run(case: Case, workdir: Path) -> dict[str, Any]:
    """Trains a case and measures it."""
    from config_border import read_config

    shutil.rmtree(ROOT / workdir, ignore_errors=True)
    flags = case.flags()
    command = [sys.executable, "train.py", *flags, f"--workdir={workdir}"]
    command.append(f"--config.train.log_every={log_every(flags)}")
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(ROOT / workdir / "compiled")}
    before, began = processor_seconds(), time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    seconds, processor = time.perf_counter() - began, processor_seconds() - before
    config = read_config(ROOT / workdir)
    lines = (ROOT / workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    tasks = dict(config.objective.tasks)
    found = without_model(config, ROOT / workdir, tasks)
    for part in found:
        name = "eval_loss" if part == "tokens" else f"eval_{part}_loss"
        found[part]["held_out"] = round(rows[-1][name], 4)
        found[part]["accuracy"] = round(rows[-1][name.replace("loss", "accuracy")], 4)
    weight = float(config.objective.task_weight) if "tokens" in found else 1.0
    weights = {part: 1.0 if part == "tokens" else weight for part in found}

    def total(values: Mapping[str, float]) -> float:
        return round(sum(values[part] * weights[part] for part in found), 4)

    nll = lambda row, part: row["nll" if part == "tokens" else f"{part}_nll"]
    curve = [[row["step"], total({part: nll(row, part) for part in found})] for row in rows]
    return {
        "title": case.title,
        "flags": flags,
        "steps": config.train.steps,
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "first": curve[0][1],
        "held_out": total({part: found[part]["held_out"] for part in found}),
        "constant": total({part: found[part]["constant"] for part in found}),
        "shuffled": shuffled(config, ROOT / workdir, rows[-1]["eval_loss"]),
        "parts": found,
        "curve": curve,
    }


def log_every(flags: list[str]) -> int:
    """Steps between two points of the curve."""
    from config_border import load_config, override

    file, *changed = flags
    config = override(load_config(file.removeprefix("--config=")), changed)
    return max(1, config.train.steps // POINTS)


def processor_seconds() -> float:
    """Of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def without_model(config: Any, workdir: Path, tasks: Mapping[str, int]) -> dict[str, Any]:
    """What is predicted -> the loss of its best constant predictor, and what that is of."""
    data, held_out = open_rows(config, workdir)
    with data.train() as loader:
        trained = list(islice(loader, config.train.steps))
    losses = constant_losses(trained, held_out, config.model.vocab_size, tasks)
    return {part: {"constant": round(loss, 4), "of": of} for part, (loss, of) in losses.items()}


def open_rows(config: Any, workdir: Path) -> tuple[Any, list[Batch]]:
    """The data of a run, and its held-out batches."""
    from experiment import read_experiment

    data = read_experiment(config, 1, training=False).open_data(workdir)
    with data.held_out(config.eval.batches) as loader:
        return data, list(loader)


# --- What is given, given to others ---------------------------------------------------------------


def shuffled(config: Any, workdir: Path, reported: float) -> float | None:
    """The held-out loss when images or sources are those of other rows; None without any.

    Args:
      config: of the run.
      workdir: with its checkpoint.
      reported: the loss that train.py gave of the same parameters.
    """
    import jax

    from data.loader import to_device
    from experiment import read_experiment
    from parallel.mesh import make_mesh
    from training.checkpoint import Checkpoints
    from training.evaluation import evaluate, make_eval_step
    from training.state import placed_params

    data, batches = open_rows(config, workdir)
    given = [name for name in batches[0] if name == "patches" or name.startswith("source_")]
    if not given or "targets" not in batches[0]:
        return None
    experiment = read_experiment(config, 1, training=False)
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        model = experiment.build_model()
        checkpoints = Checkpoints(workdir / "checkpoints")
        params = placed_params(model, experiment.precision, mesh)
        params = checkpoints.restore(None, {"params": params}, partial=True)[1]["params"]
        checkpoints.close()
        token_bytes = data.tokenizer.token_bytes()
        step = jax.jit(make_eval_step(model, experiment.precision, token_bytes))
        size = experiment.data.batch_size
        place = lambda batch: to_device(
            batch, mesh, model.rules.spec("batch seq"), np.arange(size), size
        )
        loss = lambda batches: evaluate(step, params, map(place, batches))["loss"]
        assert abs(loss(batches) - reported) < 1e-4 * max(1.0, reported)  # the same program
        mean = np.mean([loss(list(given_to_others(batches, given, s))) for s in range(SHUFFLES)])
    return round(float(mean), 4)


def given_to_others(batches: list[Batch], names: list[str], seed: int) -> Iterator[Batch]:
    """The batches with arrays of those names in a random order of all rows that are no padding."""
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    there = np.flatnonzero(counted_of(whole).any(1))
    order = np.random.default_rng(seed).permutation(there)
    for name in names:
        whole[name][there] = whole[name][order]
    for part in np.split(np.arange(len(counted_of(whole))), len(batches)):
        yield {name: array[part] for name, array in whole.items()}


# --- All of them ----------------------------------------------------------------------------------


def draw(results: Mapping[str, Any]) -> None:
    """A panel a case: training loss, the best constant (dashed), the held-out loss (dot), and that
    with others' images or sources (cross).
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "meshwright", "font.size": 7}
    import matplotlib.pyplot as plt

    columns = 4
    lines = -(-len(results) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(9, 1.75 * lines), layout="constrained")
    for panel in panels.flat[len(results) :]:
        panel.axis("off")
    for panel, row in zip(panels.flat, results.values(), strict=False):
        panel.plot(*zip(*row["curve"], strict=True), lw=1)
        panel.axhline(row["constant"], color="gray", ls="--", lw=1)
        end = dict(color="tab:orange", clip_on=False, ls="none")
        panel.plot(row["steps"], row["held_out"], "o", ms=4, **end)
        if row["shuffled"] is not None:
            panel.plot(row["steps"], row["shuffled"], "x", ms=5, **end)
        if row["first"] > WIDE * row["held_out"]:
            panel.set_yscale("log")
        else:
            panel.set_ylim(0, None)
        said = f"{row['held_out']:.3g}, constant {row['constant']:.3g}"
        panel.set(title=f"{row['title']}\n{said}", xlim=(0, row["steps"]))
        panel.title.set_fontsize(7)
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("step", fontsize=7)
    figure.supylabel("loss, nats", fontsize=7)
    figure.savefig(PICTURE, metadata={"Date": None})


def main(names: list[str]) -> None:
    unknown = sorted({*names} - {*CASES})
    if unknown:
        raise SystemExit(f"{unknown[0]}: no such case; choose from {', '.join(CASES)}")
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in names or [name for name in CASES if name not in results]:
        results[name] = run(CASES[name], RUNS / name)
        results = {known: results[known] for known in CASES if known in results}
        RESULT.write_text(as_text(results))
        shown = {key: value for key, value in results[name].items() if key != "curve"}
        print(json.dumps(shown), flush=True)
    draw(results)


def as_text(results: Mapping[str, Any]) -> str:
    """JSON with a case a line."""
    lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in results.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main(sys.argv[1:])
