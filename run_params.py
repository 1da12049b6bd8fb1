"""The parameters of a run's checkpoint, or of a Hugging Face one, on the mesh that is here."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax

from experiment import Experiment
from hf.files import open_folder
from hf.importing import find_params, read_params
from run_adapters import checkpoints_of
from training.checkpoint import Checkpoints
from training.state import Model, Tree, placed_params


class Read(NamedTuple):
    """Restored master parameters, their step (None of a Hugging Face checkpoint), their folder."""

    params: Tree
    step: int | None
    source: Path


def saved_params(
    experiment: Experiment,
    model: Model,
    mesh: jax.sharding.Mesh,
    workdir: Path | None,
    step: int | None,
    hf: Path | None,
) -> Read:
    """The parameters of a run, or of a Hugging Face checkpoint.

    Args:
      workdir: of the run, where `hf` is not given.
      step: None: the newest.

    Raises:
      ValueError: there is no such step or checkpoint, or it is of another model.
    """
    if hf is not None:
        assert step is None, "the command line refuses it"
        if experiment.adapter.method:
            raise ValueError(
                f"config.adapter.method = {experiment.adapter.method!r}: adapters are on a run; "
                f"give their --workdir, not --hf"
            )
        folder = open_folder(hf, "--hf")
        tensors = find_params(folder, experiment.model, model, experiment.precision)
        return Read(read_params(tensors, model, experiment.precision, mesh), None, hf)
    assert workdir is not None
    opened = Checkpoints(workdir / "checkpoints")
    checkpoints = checkpoints_of(opened, workdir, None, experiment, model, mesh)
    wanted = placed_params(model, experiment.precision, mesh)
    found, state = checkpoints.restore(step, {"params": wanted}, partial=True)
    checkpoints.close()
    return Read(state["params"], found, workdir / "checkpoints" / str(found))
