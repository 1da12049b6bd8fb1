"""A run of adapters: the base is read from another run's folder, its own checkpoints hold the rest.

They say which parameters they were trained on: the base's path, step and fingerprint.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from config_border import read_config
from config_sources import check_base
from config_types import build
from experiment import Experiment
from training.adapters import AdapterConfig, adapted, begun, loras, on_base, served
from training.checkpoint import CheckpointConfig, Checkpoints, PyTree
from training.naming import named
from training.state import Model, Tree, placed_params

KEY = "adapter_base"  # in a checkpoint's metadata


class Base(NamedTuple):
    """What adapters are on.

    Attributes:
      params: master parameters at rest, of the model without adapters.
      step: of the base's checkpoint.
      fingerprint: of that step's files.
    """

    params: Tree
    step: int
    fingerprint: str


def read_base(
    experiment: Experiment,
    mesh: jax.sharding.Mesh,
    saved: Mapping[str, Any] | None = None,
) -> Base:
    """Reads the base onto the mesh; call it inside `jax.set_mesh`.

    Args:
      saved: what a checkpoint of adapters says of it; None: the newest step is read.

    Raises:
      ValueError: there is no such step, it is of another model, or not what adapters were trained
        on.
    """
    folder = Path(experiment.adapter.base)
    check_base(folder)
    where = f"config.adapter.base = '{folder}'"
    checkpoints = Checkpoints(folder / "checkpoints")
    wanted = placed_params(experiment.build_base(), experiment.precision, mesh)
    step = None if saved is None else int(saved["step"])
    try:
        if saved is not None and step in checkpoints.steps():  # else `restore` says what there is
            found = checkpoints.fingerprint(step)
            if found != saved["fingerprint"]:
                raise ValueError(
                    f"step {step} there has other parameters (fingerprint {found[:12]}, the "
                    f"adapters are of {saved['fingerprint'][:12]} in {saved['path']}); give the "
                    f"run that they were trained on"
                )
        step, state = checkpoints.restore(step, {"params": wanted}, partial=True)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    checkpoints.close()
    return Base(state["params"], step, checkpoints.fingerprint(step))


class AdapterCheckpoints(Checkpoints):
    """The checkpoints of a run of adapters, for callers that know nothing of a base.

    What is on disk is the state without the base; what `restore` gives is complete.

    Args:
      model: of `training.adapters.adapted`.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig | None,
        experiment: Experiment,
        model: Model,
        mesh: jax.sharding.Mesh,
    ) -> None:
        super().__init__(directory, config)
        self._experiment, self._model, self._mesh = experiment, model, mesh
        self._base: dict[str, Any] = {}

    def begun(self) -> Tree:
        """The parameters of a new run: the base's, and new adapters."""
        experiment = self._experiment
        base = self._read_base(None)
        return begun(
            self._model, base.params, experiment.adapter, experiment.precision, experiment.seed
        )

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any]) -> None:
        """See `Checkpoints`."""
        assert self._base, "the base was not read"
        own = state._replace(params=self._model.trained(state.params))
        super().save(step, own, {**metadata, KEY: self._base})

    def restore(
        self,
        step: int | None,
        abstract_state: PyTree,
        partial: bool = False,
        left: Collection[str] = (),
    ) -> tuple[int, PyTree]:
        """See `Checkpoints`; of a whole state, or of {"params": ...} alone."""
        bare = isinstance(abstract_state, dict)
        own = self._model.trained(abstract_state["params"] if bare else abstract_state.params)
        wanted = {"params": own} if bare else abstract_state._replace(params=own)
        found, state = super().restore(step, wanted, partial, left)
        base = self._read_base(self.metadata(found)[KEY])
        params = named(state["params"] if bare else state.params)
        whole = on_base(self._model, params, named(base.params))
        return found, {"params": whole} if bare else state._replace(params=whole)

    def _read_base(self, saved: Mapping[str, Any] | None) -> Base:
        base = read_base(self._experiment, self._mesh, saved)
        path = self._experiment.adapter.base
        self._base = {"path": path, "step": base.step, "fingerprint": base.fingerprint}
        return base


def with_adapters(
    experiment: Experiment,
    model: Model,
    params: Tree,
    step: int | None,
    workdir: Path | None,
    folders: Sequence[Path],
    mesh: jax.sharding.Mesh,
) -> tuple[Model, Tree]:
    """A base with the LoRA adapters of several runs, of which each row of a batch chooses.

    Args:
      experiment, model, params, step: of the base, which `workdir` holds.
      folders: of the runs; their order gives the numbers.

    Raises:
      ValueError: a run has none of lora, or they were trained on other parameters.
    """
    if workdir is None or step is None or experiment.adapter.method:
        raise ValueError(
            f"--adapter={folders[0]}: stands on the run of --workdir, which is to be its base "
            f"without adapters"
        )
    mine = Checkpoints(workdir / "checkpoints").fingerprint(step)
    found = []
    for folder in folders:
        config = build(AdapterConfig, read_config(folder, "--adapter").adapter, "config.adapter")
        where = f"--adapter={folder}"
        if config.method != "lora":
            raise ValueError(
                f"{where}: its config.adapter.method is {config.method!r}; adapters of lora are "
                f"served together, others alone by --workdir"
            )
        own = adapted(model, config)
        checkpoints = Checkpoints(folder / "checkpoints")
        wanted = own.trained(placed_params(own, experiment.precision, mesh))
        number, state = checkpoints.restore(None, {"params": wanted}, partial=True)
        base = checkpoints.metadata(number)[KEY]
        checkpoints.close()
        if base["fingerprint"] != mine:
            raise ValueError(
                f"{where}: was trained on {base['path']}, step {base['step']}; --workdir={workdir} "
                f"has other parameters at step {step}"
            )
        found.append(loras(own, state["params"]))
    axes, both = served(model, params, found)
    return replace(model, axes=axes), both


def checkpoints_of(
    checkpoints: Checkpoints,
    workdir: Path,
    config: CheckpointConfig | None,
    experiment: Experiment,
    model: Model,
    mesh: jax.sharding.Mesh,
) -> Checkpoints:
    """The same checkpoints of a workdir; where its run is of adapters, those beside a base."""
    if not experiment.adapter.method:
        return checkpoints
    return AdapterCheckpoints(workdir / "checkpoints", config, experiment, model, mesh)
