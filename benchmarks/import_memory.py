"""Host memory of an import: how far its peak is above the parameters that stay.

Command: python benchmarks/import_memory.py [--out=benchmarks/results/import_memory.json
    --devices=1 --params=bfloat16]

Writes a folder of random bfloat16 weights in the shape of Llama 3.2 1B (1,235,814,400 parameters,
in files of at most 1 GB, 2.5 GB of temporary disk), then reads it in a process of its own, which
reads one small parameter first, so that JAX is loaded and counts for nothing. The peak is Linux's
VmHWM, which has every page that is in memory, those of mapped files too. Prints one JSON object,
sizes in bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import ml_dtypes
import numpy as np
import psutil

from hf.families import family_for, read_model
from hf.files import open_folder
from hf.importing import find_params, read_params
from hf.layout import places
from hf.writing import Written, write_weights
from models.config import ModelConfig
from parallel.mesh import MeshConfig, make_mesh
from parallel.precision import PrecisionConfig
from parallel.remat import RematConfig
from parallel.rules import ParallelConfig, make_rules
from training.causal_lm import causal_lm
from training.losses import LossConfig
from training.state import Model, abstract_params

LLAMA_1B = ModelConfig(
    vocab_size=128_256,
    layers=16,
    embed_dim=2048,
    mlp_dim=8192,
    heads=32,
    kv_heads=8,
    head_dim=64,
    max_length=131_072,
    norm_eps=1e-5,
    rope_theta=500_000.0,
    rope_scaling="llama3",
    rope_factor=32.0,
)
MIB = 1 << 20
ALLOWED = 64 * MIB  # beside one tensor


def write_folder(path: Path, config: ModelConfig, file_bytes: int) -> None:
    """A checkpoint of random weights, made one tensor at a time."""
    family = family_for(config)
    with divided(config, 1) as (model, _):
        abstract = abstract_params(model, PrecisionConfig())
    found = places(family.links(config), config, model.axes, abstract)
    rng, dtype = np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16)

    def random(shape: tuple[int, ...]) -> np.ndarray:
        return (rng.random(shape, np.float32) - 0.5) * 0.04

    def written(shape: tuple[int, ...]) -> Written:
        return Written(shape, dtype, lambda: random(shape))

    names = {name: place.their_shape for place in found.values() for name in place.names}
    path.mkdir(parents=True)
    write_weights(path, {name: written(shape) for name, shape in names.items()}, file_bytes)
    keys = {"architectures": [family.architecture], **family.write(config)}
    (path / "config.json").write_text(json.dumps(keys))


@contextmanager
def divided(config: ModelConfig, devices: int) -> Iterator[tuple[Model, jax.sharding.Mesh]]:
    """The model divided by FSDP, and its mesh, inside `jax.set_mesh`."""
    sizes = MeshConfig(data=1, fsdp=devices)
    mesh = make_mesh(sizes, jax.devices()[:devices])
    dims = config.dims() | {"batch": (devices, "batch"), "residual_seq": (128, "length")}
    with jax.set_mesh(mesh):
        rules = make_rules(ParallelConfig(), sizes.sizes(), dims)
        yield causal_lm(config, LossConfig(), rules, RematConfig()), mesh


def read(path: Path, params: str) -> dict[str, int]:
    """Imports a folder in this process, over all its devices.

    Returns:
      Bytes: of the parameters, of the folder's largest tensor, by which the process has grown after
      the import, and had grown at its peak.
    """
    config = ModelConfig(**read_model(path, "--hf"))
    precision = PrecisionConfig(params=params, compute=params)
    folder = open_folder(path, "--hf")
    with divided(config, jax.device_count()) as (model, mesh):
        found = find_params(folder, config, model, precision)
        small = min(range(len(found)), key=lambda i: math.prod(found[i].place.shape))
        alone = dataclasses.replace(model, axes=jax.tree.leaves(model.axes)[small])
        read_params([found[small]], alone, precision, mesh)
        gc.collect()
        before = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        tree = read_params(found, model, precision, mesh)
    return {
        "parameters": sum(leaf.nbytes for leaf in jax.tree.leaves(tree)),
        "largest_tensor": max(tensor.nbytes for tensor in folder.tensors.values()),
        "grown": psutil.Process().memory_info().rss - before,
        "peak": _peak() - before,
    }


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(path: Path, devices: int, params: str) -> dict[str, Any]:
    """`read` in a process of its own, and what is over."""
    done = subprocess.run(
        [sys.executable, __file__, f"--read={path}", f"--params={params}"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    sizes = json.loads(done.stdout)
    over = sizes["peak"] - sizes["parameters"]
    return sizes | {"over": over, "allowed": sizes["largest_tensor"] + ALLOWED}


def main() -> None:
    """Writes, measures, prints, keeps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--params", default="bfloat16")
    parser.add_argument("--read", type=Path, help="measure this folder in this process")
    args = parser.parse_args()
    if args.read is not None:
        print(json.dumps(read(args.read, args.params)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder) / "in", LLAMA_1B, 10**9)
        sizes = measure(Path(folder) / "in", args.devices, args.params)
    result = {
        "command": f"python benchmarks/import_memory.py --devices={args.devices} "
        f"--params={args.params}",
        "shape": "Llama 3.2 1B, bfloat16 on disk",
        **sizes,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
