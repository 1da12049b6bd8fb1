"""The teacher of a run: its parameters on the student's mesh, and what makes it the same one."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from config_border import is_run
from data.recipes import marks_of
from data.tokens import Tokenizer, open_tokenizer
from experiment import Experiment
from experiment_teacher import KEY, own_config
from hf.files import CheckpointFolder, open_folder
from hf.importing import find_params, read_params
from training import manifest
from training.checkpoint import Checkpoints
from training.distill import Distillation
from training.state import Model, Tree, count_of, placed_params

SAMPLE = 4096  # bytes of every tensor that are hashed, of a checkpoint that has no checksums
TOKENIZER = "tokenizer.json"


class Teacher(NamedTuple):
    """What a run has of its teacher; nothing without one.

    Attributes:
      distillation: for the step.
      arguments: of the step, beside state and batch: the teacher's parameters.
      fingerprint: other weights have another; empty without a teacher.
      line: for a person.
    """

    distillation: Distillation | None = None
    arguments: tuple[Tree, ...] = ()
    fingerprint: str = ""
    line: str = ""


def open_teacher(
    config: ConfigDict,
    experiment: Experiment,
    student: Model,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
) -> Teacher:
    """Checks the teacher of `config.distill` and reads it, at rest in its compute dtype.

    Args:
      tokenizer: of the student's data.

    Raises:
      ValueError: it has no such step, other tokens, or parameters of another model.
    """
    distillation, teacher = experiment.distillation(student), experiment.teacher
    if distillation is None or teacher is None:
        return Teacher()
    folder = Path(config.distill.teacher)
    where = f"{KEY} = '{folder}'"
    _check_tokens(config, experiment, tokenizer, folder)
    model, precision = distillation.teacher, teacher.precision
    try:
        if is_run(folder):
            checkpoints = Checkpoints(folder / "checkpoints")
            wanted = {"params": placed_params(model, precision, mesh)}
            step = config.distill.teacher_step or None
            found, state = checkpoints.restore(step, wanted, partial=True)
            checkpoints.close()
            params, name = state["params"], f"step {found}"
            content = (folder / "checkpoints" / str(found) / manifest.NAME).read_bytes()
        else:
            opened = open_folder(folder, KEY)
            params = read_params(
                find_params(opened, teacher.model, model, precision), model, precision, mesh
            )
            name, content = "checkpoint", _sampled(opened)
    except ValueError as error:
        words = str(error).removeprefix("--workdir: ")
        raise ValueError(words if words.startswith(KEY) else f"{where}: {words}") from error
    fingerprint = f"{name} {hashlib.sha256(content).hexdigest()[:12]}"
    line = f"teacher: {folder}: {name}, {count_of(params):,} parameters in {precision.compute}"
    return Teacher(distillation, (params,), fingerprint, line)


def check_same_teacher(saved: str, now: str, folder: str, workdir: Path) -> None:
    """Refuses to continue with other weights of a teacher than the checkpoint has learnt from."""
    if saved != now:
        raise ValueError(
            f"{KEY} = '{folder}': --workdir={workdir} has learnt from {saved}, and this is {now}; "
            f"give the same one (config.distill.teacher_step says which step) or another --workdir"
        )


def _check_tokens(
    config: ConfigDict, experiment: Experiment, tokenizer: Tokenizer, folder: Path
) -> None:
    """Refuses a teacher whose columns of logits are other tokens, where its folder says so."""
    data = own_config(config).data
    if data.tokenizer == "bpe" and not (folder / TOKENIZER).is_file():
        return  # weights alone: that there are as many was checked
    taught = experiment.teacher
    assert taught is not None
    given = replace(experiment.data, tokenizer=data.tokenizer, end_token=data.end_token)
    marks = marks_of(taught.objective)
    theirs = open_tokenizer(given, taught.model.vocab_size, folder, lambda: (), marks)
    same = theirs.fingerprint == tokenizer.fingerprint
    vocab = getattr(theirs, "vocab", None)
    if same or (vocab is not None and vocab == getattr(tokenizer, "vocab", None)):
        return
    file = folder / TOKENIZER
    right = str(file) if file.is_file() else data.tokenizer
    raise ValueError(
        f"{KEY} = '{folder}': its tokens are those of {right}, and config.data.tokenizer = "
        f"'{config.data.tokenizer}' makes others; set config.data.tokenizer to it"
    )


def _sampled(folder: CheckpointFolder) -> bytes:
    """What a checkpoint of Hugging Face is told by: names, shapes, and the first bytes of each."""
    parts = []
    for name, stored in sorted(folder.tensors.items()):
        parts.append(f"{name} {stored.kind} {stored.shape}".encode())
        with stored.file.open("rb") as file:
            file.seek(stored.start)
            parts.append(file.read(min(SAMPLE, stored.nbytes)))
    return b"\n".join(parts)
