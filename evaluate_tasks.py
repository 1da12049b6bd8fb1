"""Tasks of lm-eval on a checkpoint: found, checked, run, for evaluate.py."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.tokens import Tokenizer

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from experiment import Experiment
    from run_params import Read
    from training.state import Model


def find_tasks(experiment: Experiment, names: str, folder: Path | None) -> dict[str, Any]:
    """The tasks of `--tasks` and `--task_folder`, before a model is read.

    Raises:
      ValueError: a family that gives texts no probability, or what `load_tasks` refuses.
    """
    from harness.families import check_family
    from harness.tasks import load_tasks

    check_family(experiment.model)
    return load_tasks([name.strip() for name in names.split(",")], folder, generates=True)


def on_tasks(
    experiment: Experiment,
    model: Model,
    mesh: Mesh,
    folder: Path,
    tokenizer: Tokenizer,
    read: Read,
    tasks: dict[str, Any],
    limit: int | None,
) -> dict[str, Any]:
    """`tasks`: task -> metric -> value; answers are kept in the folder."""
    from harness.answers import Answers, answers_path
    from harness.evaluation import run_tasks
    from harness.lm import make_lm
    from task_texts import TaskTexts

    data, computed = experiment.data, (experiment.model, experiment.precision, experiment.objective)
    path = answers_path(folder, read.step, read.source, computed, tokenizer)
    with closing(Answers(path)) as answers:
        lm = make_lm(
            model,
            read.params,
            experiment.model,
            experiment.precision,
            mesh,
            tokenizer,
            tokens=data.batch_size * (data.sequence_length + experiment.source_length),
            prefix=experiment.objective.name == "prefix_lm",
            answers=answers,
            generate=TaskTexts(experiment, model, read.params, mesh, tokenizer),
        )
        return {"tasks": run_tasks(lm, tasks, limit)}
