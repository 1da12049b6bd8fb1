"""Evaluates a checkpoint on held-out text, on any mesh; the last line of stdout is one JSON object.

    python evaluate.py --workdir=runs/tiny
    JAX_NUM_CPU_DEVICES=8 python evaluate.py --workdir=runs/tiny --step=200 \
        --config.mesh.data=1 --config.mesh.fsdp=4 --config.mesh.tensor=2
    python evaluate.py --hf=DIR [--config=configs/tiny.py]

The config is that of the workdir. Moments are not read: parameters alone are restored.
Schedule and micro-batches are the training's: nothing is asked of them here.

With --hf the model and its tokenizer are those of a Hugging Face checkpoint, data and mesh those of
--config or of configs/base.py; tokenised text is kept where a --workdir is given.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cli
from parallel.huge_pages import use_huge_pages


def main(config: Any, workdir: Path | None, step: int | None, hf: Path | None = None) -> None:
    """Config, mesh, parameters, data, loss."""
    if hf is not None and step is not None:
        raise ValueError(f"--step={step}: --hf has no steps; leave it out")
    import jax  # here: a typo on the command line costs no import

    from data.loader import device_batches, local_rows
    from experiment import read_experiment
    from hf.files import open_folder
    from hf.importing import find_params, read_params
    from parallel.compilation import keep_compiled, safe_compilation
    from parallel.mesh import make_mesh
    from training.checkpoint import Checkpoints
    from training.evaluation import evaluate, make_eval_step
    from training.state import placed_params

    keep_compiled()
    experiment = read_experiment(config, jax.device_count(), training=False)
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh), ExitStack() as stack:
        model = experiment.build_model()
        folder = workdir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = None
        if hf is not None:
            tensors = find_params(
                open_folder(hf, "--hf"), experiment.model, model, experiment.precision
            )
            params = read_params(tensors, model, experiment.precision, mesh)
        else:
            checkpoints = Checkpoints(folder / "checkpoints")
            wanted = placed_params(model, experiment.precision, mesh)
            found, state = checkpoints.restore(step, {"params": wanted}, partial=True)
            checkpoints.close()
            params = state["params"]

        data = experiment.open_data(folder)
        spec = model.rules.spec("batch seq")
        rows = local_rows(mesh, spec, experiment.data.batch_size)
        token_bytes = data.tokenizer.token_bytes()
        eval_step = jax.jit(
            make_eval_step(model, experiment.precision, token_bytes),
            compiler_options=safe_compilation(),
        )
        with data.held_out(experiment.eval.batches, rows=rows) as loader:
            result = evaluate(eval_step, params, device_batches(loader, mesh, spec))
    if jax.process_index() == 0:
        what = hf if hf is not None else f"{workdir}: step {found}"
        print(f"{what}, {experiment.describe_layout()}")
        print(json.dumps({"step": found} | result))


if __name__ == "__main__":
    use_huge_pages()
    flags = [cli.Flag("step", int, None, "the step to restore; default: the newest")]
    cli.run(
        main, name="evaluate.py", about=__doc__, config_from="workdir or checkpoint", flags=flags
    )
