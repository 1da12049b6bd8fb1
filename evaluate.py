"""Evaluates a checkpoint on held-out text, on any mesh; the last line of stdout is one JSON object.

    python evaluate.py --workdir=runs/tiny
    JAX_NUM_CPU_DEVICES=8 python evaluate.py --workdir=runs/tiny --step=200 \
        --config.mesh.data=1 --config.mesh.fsdp=4 --config.mesh.tensor=2

The config is that of the workdir. Moments are not read: parameters alone are restored.
Schedule and micro-batches are the training's: nothing is asked of them here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cli
from parallel.huge_pages import use_huge_pages


def main(config: Any, workdir: Path, step: int | None) -> None:
    """Config, mesh, data, parameters, loss."""
    import jax  # here: a typo on the command line costs no import

    from data.dataset import open_data
    from data.loader import device_batches, local_rows
    from experiment import read_experiment
    from parallel.compilation import keep_compiled, safe_compilation
    from parallel.mesh import make_mesh
    from training.checkpoint import Checkpoints
    from training.evaluation import evaluate, make_eval_step
    from training.state import abstract_params, shardings_of

    keep_compiled()
    experiment = read_experiment(config, jax.device_count(), training=False)
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        model = experiment.build_model()
        abstract = abstract_params(model, experiment.precision)
        specs = jax.tree.map(lambda p, n: model.rules.at_rest(n, p.shape), abstract, model.axes)
        wanted = jax.tree.map(
            lambda p, sharding: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=sharding),
            abstract,
            shardings_of(specs, mesh),
        )
        checkpoints = Checkpoints(workdir / "checkpoints")
        found, state = checkpoints.restore(step, {"params": wanted}, partial=True)

        data = open_data(
            experiment.data, experiment.model.vocab_size, workdir, seed=experiment.seed
        )
        spec = model.rules.spec("batch seq")
        rows = local_rows(mesh, spec, experiment.data.batch_size)
        token_bytes = data.tokenizer.token_bytes()
        eval_step = jax.jit(
            make_eval_step(model, experiment.precision, token_bytes),
            compiler_options=safe_compilation(),
        )
        with data.held_out(experiment.eval.batches, rows=rows) as loader:
            result = evaluate(eval_step, state["params"], device_batches(loader, mesh, spec))
        checkpoints.close()
    if jax.process_index() == 0:
        print(f"{workdir}: step {found}, {experiment.describe_layout()}")
        print(json.dumps({"step": found} | result))


if __name__ == "__main__":
    use_huge_pages()
    flags = [cli.Flag("step", int, None, "the step to restore; default: the newest")]
    cli.run(main, name="evaluate.py", about=__doc__, config_from="workdir", flags=flags)
