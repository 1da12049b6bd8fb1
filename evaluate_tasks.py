"""Tasks of lm-eval on a checkpoint: found, checked, run, for evaluate.py."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.recipes import marks_of
from data.tokens import Tokenizer, open_tokenizer

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from evaluate import Read
    from experiment import Experiment
    from training.state import Model


def find_tasks(experiment: Experiment, names: str, folder: Path | None) -> dict[str, Any]:
    """The tasks of `--tasks` and `--task_folder`, before a model is read.

    Raises:
      ValueError: a family that gives texts no probability, or what `load_tasks` refuses.
    """
    from harness.families import check_family
    from harness.tasks import load_tasks

    check_family(experiment.model)
    return load_tasks([name.strip() for name in names.split(",")], folder, generates=False)


def tokenizer_for(experiment: Experiment, folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint; none is trained here.

    Raises:
      ValueError: no such file, or it has tokens that the model has not.
    """
    path = folder / "tokenizer.json"
    if experiment.data.tokenizer == "bpe" and not path.is_file():
        raise ValueError(
            f"config.data.tokenizer = 'bpe': {path} is not there; give the path of the "
            f"checkpoint's tokenizer.json"
        )
    marks = marks_of(experiment.objective)
    return open_tokenizer(experiment.data, experiment.model.vocab_size, folder, lambda: (), marks)


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
        )
        return {"tasks": run_tasks(lm, tasks, limit)}
