"""Evaluates a checkpoint on held-out text or on tasks of lm-eval, on any mesh; the last line of
stdout is one JSON object.

    python evaluate.py --workdir=runs/tiny
    JAX_NUM_CPU_DEVICES=8 python evaluate.py --workdir=runs/tiny --step=200 \
        --config.mesh.data=1 --config.mesh.fsdp=4 --config.mesh.tensor=2
    python evaluate.py --hf=DIR [--config=configs/tiny.py]
    python evaluate.py --workdir=runs/tiny --tasks=NAME,NAME [--task_folder=DIR] [--limit=N]

The config is that of the workdir. Moments are not read: parameters alone are restored.
Schedule and micro-batches are the training's: nothing is asked of them here.

With --hf the model and its tokenizer are those of a Hugging Face checkpoint, data and mesh those of
--config or of configs/base.py; tokenised text is kept where a --workdir is given.

With --tasks each answer is kept in WORKDIR/tasks, and the same command goes on where it stopped;
docs/evaluation.md tells what a task is. No held-out text is read then.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cli
from parallel.huge_pages import use_huge_pages

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from experiment import Experiment
    from training.state import Model


def main(
    config: Any,
    workdir: Path | None,
    step: int | None,
    tasks: str | None = None,
    task_folder: Path | None = None,
    limit: int | None = None,
    hf: Path | None = None,
) -> None:
    """Config, tasks, mesh, parameters, and what is measured."""
    if hf is not None and step is not None:
        raise ValueError(f"--step={step}: --hf has no steps; leave it out")
    for name, value in (("task_folder", task_folder), ("limit", limit)):
        if tasks is None and value is not None:
            raise ValueError(f"--{name}={value}: read only with --tasks=NAME; give both or neither")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit={limit}: at least 1 document of each task")
    import jax  # here: a typo on the command line costs no import

    from evaluate_tasks import find_tasks, on_tasks
    from experiment import read_experiment
    from parallel.compilation import keep_compiled
    from parallel.mesh import make_mesh
    from prompt_tokens import tokenizer_of
    from run_params import saved_params

    keep_compiled()
    experiment = read_experiment(config, jax.device_count(), training=False)
    chosen = None if tasks is None else find_tasks(experiment, tasks, task_folder)
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh), ExitStack() as stack:
        model = experiment.build_model()
        folder = workdir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if chosen is None:
            read = saved_params(experiment, model, mesh, folder, step, hf)
            result = on_held_out_text(experiment, model, mesh, folder, read.params)
        else:
            tokenizer = tokenizer_of(experiment, folder)  # refused before anything is restored
            read = saved_params(experiment, model, mesh, folder, step, hf)
            result = on_tasks(experiment, model, mesh, folder, tokenizer, read, chosen, limit)
    if jax.process_index() == 0:
        what = hf if hf is not None else f"{workdir}: step {read.step}"
        print(f"{what}, {experiment.describe_layout()}")
        print(json.dumps({"step": read.step} | result))


def on_held_out_text(
    experiment: Experiment, model: Model, mesh: Mesh, folder: Path, params: Any
) -> dict[str, float]:
    """Loss, perplexity and the rest on held-out rows."""
    import jax

    from data.loader import device_batches, local_rows
    from parallel.compilation import safe_compilation
    from training.evaluation import evaluate, make_eval_step

    data = experiment.open_data(folder)
    spec = model.rules.spec("batch seq")
    rows = local_rows(mesh, spec, experiment.data.batch_size)
    token_bytes = data.tokenizer.token_bytes()
    eval_step = jax.jit(
        make_eval_step(model, experiment.precision, token_bytes),
        compiler_options=safe_compilation(),
    )
    with data.held_out(experiment.eval.batches, rows=rows) as loader:
        return evaluate(eval_step, params, device_batches(loader, mesh, spec))


FLAGS = [
    cli.Flag("step", int, None, "the step to restore; default: the newest"),
    cli.Flag("tasks", str, None, "tasks of lm-eval, with a comma between them"),
    cli.Flag("task_folder", Path, None, "a folder with task files of your own"),
    cli.Flag("limit", int, None, "documents of each task at most"),
]

if __name__ == "__main__":
    use_huge_pages()
    cli.run(
        main, name="evaluate.py", about=__doc__, config_from="workdir or checkpoint", flags=FLAGS
    )
