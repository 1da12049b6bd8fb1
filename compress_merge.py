"""`python -m compress merge`: a run's adapters put into the weights that they are on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ABOUT = "Adapters into the weights that they are on (docs/adapters.md)."


def main(config: Any, workdir: Path, out: Path, step: int | None) -> None:
    """The run with its base, dense weights, the new run."""
    import jax  # here: a typo on the command line costs no import

    from compressing import check_out, write_step
    from config_border import with_values
    from experiment import read_experiment
    from parallel.mesh import make_mesh
    from run_params import saved_params
    from training.adapters import merged
    from training.state import count_of

    check_out(out)
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
        write_step(workdir, out, read.step, new, params, {"merged": str(workdir)})
    count = count_of(params)
    print(f"{out}: {workdir} step {read.step} merged, {count:,} parameters in {precision}")
    print(json.dumps({"step": read.step, "parameters": count}))
