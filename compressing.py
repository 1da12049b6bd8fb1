"""What every `python -m compress` command does around its method: opens a run, writes another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
from ml_collections import ConfigDict

from compress.calibration import Calibration
from compress.result import Result
from compress.walk import is_dense, matrices_of
from compressed_size import sizes
from config_border import with_values, write_config
from config_types import plain
from data.loader import device_batches, local_rows
from experiment import Experiment, read_experiment
from parallel.forms import Form
from parallel.mesh import MeshConfig, make_mesh
from parallel.remat import FORWARD, RematConfig
from parallel.rules import STACKS, ParallelConfig
from parallel.stored import Matrix
from run_params import saved_params
from training.checkpoint import CheckpointConfig, Checkpoints
from training.naming import named
from training.state import Model, Tree
from training.stored import WeightsConfig, chosen_forms

TOKENIZER = "tokenizer.json"
BATCH = 16  # rows of calibration text at a time
MIB = 2**20


@dataclass(frozen=True)
class Run:
    """A run that is opened to be made smaller.

    Attributes:
      config: complete.
      experiment: of it, without what training alone wants.
      model: as it is stored.
      params: its master parameters.
      step: that they are of.
      scratch: an empty folder beside the new run's, until it is written.
    """

    config: ConfigDict
    experiment: Experiment
    model: Model
    mesh: jax.sharding.Mesh
    params: Tree
    workdir: Path
    step: int
    scratch: Path

    def calibration(self, rows: int, seed: int, what: str) -> Calibration:
        """Rows of the run's training text, in an order of its own.

        Raises:
          ValueError: too few.
        """
        length = self.experiment.data.sequence_length
        axes, params = named(self.model.axes), named(self.params)
        inputs = {n: Matrix.of(params[n].shape, axes[n]).rows for n in matrices_of(self.model)}
        name = max(inputs, key=lambda n: inputs[n])
        if rows * length < inputs[name]:
            least = -(-inputs[name] // length)
            raise ValueError(
                f"--rows={rows}: {rows * length} tokens say too little of the {inputs[name]} "
                f"inputs of {name}, which {what} is calibrated on; give at least {least} rows"
            )
        size = next(n for n in range(BATCH, 0, -1) if rows % n == 0)
        data = self.experiment.open_data(self.workdir)
        data = replace(data, seed=seed, config=replace(data.config, batch_size=size))
        mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
        alone = replace(self.experiment, mesh=MeshConfig(data=1), parallel=ParallelConfig())
        with jax.set_mesh(mesh):
            model = alone.build_model()
            spec = model.rules.spec("batch seq")
            with data.train(0, rows=local_rows(mesh, spec, size)) as loader:
                batches = device_batches(loader, mesh, spec)
                return Calibration(model, mesh, [next(batches) for _ in range(rows // size)])


@contextmanager
def opened(config: ConfigDict, workdir: Path, step: int | None, out: Path) -> Iterator[Run]:
    """A run's dense model and parameters, inside its mesh.

    Raises:
      ValueError: several processes, an `--out` that is there, or a run that is compressed already.
    """
    check_out(out)
    # What it is made of, and what is written, are the master weights: rounded once.
    config = with_values(config, {"config.quantize.forms": {}})
    experiment = read_experiment(config, jax.device_count(), training=False)
    experiment = replace(experiment, remat=RematConfig(FORWARD))
    if experiment.adapter.method:
        raise ValueError(
            f"--workdir={workdir}: a run of adapters ({experiment.adapter.method}); give what "
            f"python -m compress merge makes of it, or its config.adapter.base"
        )
    if experiment.mesh.pipe > 1:
        raise ValueError(
            f"config.mesh.pipe = {experiment.mesh.pipe}: compression knows no stages; give "
            f"--config.mesh.pipe=1, and fsdp or tensor higher"
        )
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        model = experiment.build_model()
        read = saved_params(experiment, model, mesh, workdir, step, None)
        if not is_dense(read.params):
            raise ValueError(
                f"--workdir={workdir}: its weights are stored in other forms already "
                f"(config.weights.forms); give the dense run that it was made of"
            )
        assert read.step is not None
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            found = (config, experiment, model, mesh, read.params, workdir, read.step)
            yield Run(*found, Path(scratch))


def forms_of(run: Run, only: str, text: str, flag: str) -> dict[str, list[Form]]:
    """The form of every layer of the matrices that a pattern names.

    Args:
      text: of a form, as `parallel.forms` reads it.
      flag: what gave it, for messages.
    """
    arrays, axes = named(run.params), named(run.model.axes)
    shapes = {name: tuple(a.shape) for name, a in arrays.items()}
    found = chosen_forms(WeightsConfig({only: text}), shapes, axes, key=flag)
    layers = lambda name: shapes[name][0] if axes[name].split()[0] in STACKS else 1
    return {name: forms.of_layers(layers(name)) for name, forms in found.items()}


def compressed_model(run: Run, values: Mapping[str, Any]) -> tuple[ConfigDict, Model]:
    """The config with new values, and the model that it gives on the run's mesh."""
    config = with_values(run.config, values)
    experiment = read_experiment(config, jax.device_count(), training=False)
    return config, replace(experiment, remat=RematConfig(FORWARD)).build_model()


def finish(
    run: Run,
    made: Result,
    out: Path,
    how: Mapping[str, Any],
    values: Mapping[str, Any] | None = None,
) -> None:
    """Writes what a method made as a run, and says what it weighs; the run's params are used up.

    Args:
      values: keys of the config that change beside `config.weights.forms`.
    """
    dense = sum(a.nbytes for a in jax.tree.leaves(run.params))
    keys = {"config.weights.forms": made.forms()} | dict(values or {})
    config, model = compressed_model(run, keys)
    params = made.finished(model, run.mesh)
    report(out, dense, write_run(run, config, params, out, how))


def write_run(
    run: Run, config: ConfigDict, params: Tree, out: Path, how: Mapping[str, Any]
) -> dict[str, Any]:
    """A run's folder with one step: an ordinary checkpoint, its config and its tokenizer.

    Args:
      how: what was done, kept in the checkpoint's metadata.

    Returns:
      What `compressed_size.sizes` says, and the bytes of the step's folder.
    """
    metadata = Checkpoints(run.workdir / "checkpoints").metadata(run.step)
    steps = {"compressed": [*metadata.get("compressed", []), dict(how)]}
    write_step(run.workdir, out, run.step, config, params, steps)
    folder = out / "checkpoints" / str(run.step)
    disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    own = sizes(read_experiment(config, jax.device_count(), training=False), params)
    return {"step": run.step, **own, "disk_bytes": disk}


def write_step(
    workdir: Path,
    out: Path,
    step: int,
    config: ConfigDict,
    params: Tree,
    more: Mapping[str, Any],
) -> None:
    """A new run of one step: checkpoint, config, and the tokenizer of the run it is made of.

    Args:
      more: what the checkpoint's metadata has beside the data's place and the config.
    """
    before = Checkpoints(workdir / "checkpoints").metadata(step)
    kept = {"data": before.get("data"), "config": plain(config), "metrics": {}}
    checkpoints = Checkpoints(out / "checkpoints", CheckpointConfig())
    checkpoints.save(step, {"params": params}, kept | dict(more))
    checkpoints.close()
    if (workdir / TOKENIZER).is_file():
        shutil.copyfile(workdir / TOKENIZER, out / TOKENIZER)
    write_config(out, config)


def check_out(out: Path) -> None:
    """Refuses to begin where the new run could not be written.

    Raises:
      ValueError: several processes, or a folder that is there.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"--num_processes={jax.process_count()}: one process writes the new run; run it alone, "
            f"on any mesh of its devices"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out={out}: is there already; give a folder that is not")


def report(out: Path, dense_bytes: int, found: Mapping[str, Any]) -> None:
    """Two lines for a person, and one JSON object."""
    bits, part = found["bits_per_matrix_weight"], found["bytes"] / dense_bytes
    print(
        f"{out}: {found['bytes'] / MIB:,.1f} MiB of arrays, {part:.3f} of the dense model's; "
        f"{bits:.3f} bits for each weight of its matrices; {found['disk_bytes'] / MIB:,.1f} MiB on "
        f"disk"
    )
    print(json.dumps(dict(found)))
