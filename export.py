"""Writes a run's checkpoint as a folder that Hugging Face's `transformers` loads.

    python export.py --workdir=runs/tiny --out=tiny-hf
    python export.py --workdir=runs/tuned --out=tuned-hf --dtype=bfloat16 --shard_gb=2

A run that began from a checkpoint (`config.init_from`) goes back as that one was: its family,
names, dtypes and tokenizer; --like=DIR says so of another. Else the family is the first that
computes what `config.model` says, weights are float32, and the run's tokenizer is copied.

Of a compressed run (`config.weights.forms`) the dense arrays are written that its codes or factors
stand for: the folder computes the same, and is as large as the dense run's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cli
from parallel.huge_pages import use_huge_pages

DTYPES = ("float32", "bfloat16", "float16")


def main(
    config: Any,
    workdir: Path,
    out: Path,
    step: int | None,
    like: Path | None,
    dtype: str | None,
    shard_gb: float,
) -> None:
    """Config, mesh, parameters, folder."""
    import jax  # here: a typo on the command line costs no import

    from config_border import is_run
    from experiment import read_experiment
    from hf.exporting import GB, export_params, refuse_existing
    from hf.files import open_folder
    from parallel.mesh import make_mesh
    from run_params import saved_params
    from training.adapters import merged
    from training.stored import dense_params

    if jax.process_count() > 1:
        raise ValueError(
            f"--num_processes={jax.process_count()}: one process writes a folder; run export.py "
            f"alone, on any mesh"
        )
    if not shard_gb > 0:
        raise ValueError(f"--shard_gb={shard_gb}: GB of a file, more than 0")
    refuse_existing(out)
    source = None
    if like is not None or (config.init_from and not is_run(config.init_from)):
        key = "config.init_from" if like is None else "--like"
        source = open_folder(like or Path(config.init_from), key)
    experiment = read_experiment(config, jax.device_count(), training=False)
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        model = experiment.build_model()
        params, found, _ = saved_params(experiment, model, mesh, workdir, step, None)
        if experiment.adapter.method:
            params = merged(model, params, experiment.adapter)
            model = experiment.build_dense()
        elif experiment.weights.forms:
            params = dense_params(params, model.axes)
            model = experiment.build_dense()
            print(f"note: {workdir} is compressed (config.weights.forms), and {out} is dense")
        special, files = ({}, {}) if source is not None else tokenizer_of(experiment, workdir)
        architecture = export_params(
            params,
            experiment.model,
            model.axes,
            out,
            like=source,
            dtype=dtype,
            shard_bytes=int(shard_gb * GB),
            special=special,
            files=files,
        )
    print(f"{workdir}: step {found} as {architecture} in {out}")


def tokenizer_of(experiment: Any, workdir: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Keys of config.json and files that say the run's tokenizer; bytes have none."""
    from data.tokens import JsonTokenizer

    data = experiment.data
    if data.tokenizer == "bytes":
        return {"eos_token_id": 256}, {}
    path = workdir / "tokenizer.json" if data.tokenizer == "bpe" else Path(data.tokenizer)
    tokenizer = JsonTokenizer(path.expanduser(), end_token=data.end_token)
    end = next(token for token, number in tokenizer.vocab.items() if number == tokenizer.end_id)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    files = {
        "tokenizer.json": path.expanduser().read_bytes(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
    }
    return {"eos_token_id": tokenizer.end_id}, files


FLAGS = (
    cli.Flag("out", Path, None, "the folder to write; it is not there yet", required=True),
    cli.Flag("step", int, None, "the step to write; default: the newest"),
    cli.Flag("like", Path, None, "a checkpoint of the same family to follow in all else"),
    cli.Flag("dtype", str, None, "of the weights; default: that of --like, or float32", DTYPES),
    cli.Flag("shard_gb", float, 5.0, "GB of a file, at most"),
)

if __name__ == "__main__":
    use_huge_pages()
    cli.run(main, name="export.py", about=__doc__, config_from="workdir", flags=FLAGS)
