"""`python -m compress merge`: a run's adapters put into the weights that they are on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

ABOUT = "Adapters into the weights that they are on (docs/adapters.md)."
TOKENIZER = "tokenizer.json"


def main(config: Any, workdir: Path, out: Path, step: int | None) -> None:
    """The run with its base, dense weights, the new run."""
    import jax  # here: a typo on the command line costs no import

    from config_border import with_values, write_config
    from config_types import plain
    from experiment import read_experiment
    from parallel.mesh import make_mesh
    from run_params import saved_params
    from training.adapters import merged
    from training.checkpoint import CheckpointConfig, Checkpoints
    from training.state import count_of

    if jax.process_count() > 1:
        raise ValueError(
            f"--num_processes={jax.process_count()}: one process merges; run it alone, on any mesh "
            f"of its devices"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out={out}: is there already; give a folder that is not")
    experiment = read_experiment(config, jax.device_count(), training=False)
    if not experiment.adapter.method:
        raise ValueError(
            f"--workdir={workdir}: has no adapters (config.adapter.method is ''); give a run that "
            f"was trained with them"
        )
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        model = experiment.build_model()
        read = saved_params(experiment, model, mesh, workdir, step, None)
        params = merged(model, read.params, experiment.adapter)
        precision = experiment.precision.params
        params = jax.tree.map(lambda a: a.astype(precision), params)
        values = {"config.adapter.method": "", "config.adapter.base": ""}
        new = with_values(config, values | {"config.weights.forms": {}})
        assert read.step is not None
        before = Checkpoints(workdir / "checkpoints").metadata(read.step)
        kept = {"data": before.get("data"), "config": plain(new), "metrics": {}}
        checkpoints = Checkpoints(out / "checkpoints", CheckpointConfig())
        checkpoints.save(read.step, {"params": params}, kept | {"merged": str(workdir)})
        checkpoints.close()
    if (workdir / TOKENIZER).is_file():
        shutil.copyfile(workdir / TOKENIZER, out / TOKENIZER)
    write_config(out, new)
    count = count_of(params)
    print(f"{out}: {workdir} step {read.step} merged, {count:,} parameters in {precision}")
    print(json.dumps({"step": read.step, "parameters": count}))
