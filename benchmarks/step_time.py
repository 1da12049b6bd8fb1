"""Times our training step against bare JAX steps of the same model, in turns, on CPU.

    JAX_PLATFORMS=cpu python benchmarks/step_time.py --rounds=15
    JAX_PLATFORMS=cpu python benchmarks/step_time.py --rounds=15 --torch=a/python/that/has/torch
    JAX_PLATFORMS=cpu python benchmarks/step_time.py --rounds=15 --devices=8

One device: a GPT-2-like model of 41.8M parameters against `bare.py`, its layers scanned and
unrolled, and with `--torch` against the compiled step of `torch_gpt2.py`, which takes its turns in
a process of its own. Eight simulated devices: a smaller model against the scanned bare step in the
same layout, FSDP8 and then TP4 x DP2. All start from the same parameters, see the same batches and
do the same maths (float32, AdamW, clipping, one document a row); every loss is held to that of the
scanned bare step. All run with huge pages (`parallel/huge_pages.py`);
GLIBC_TUNABLES=glibc.malloc.hugetlb=0 turns them off. `--set model.unroll=1 "model.attention='xla'"`
changes keys of our config.

Prints one JSON line a variant. Seconds are of a step; `ratio` is to the best bare step: the median
over rounds of the ratio within a round, in which a busy neighbour slows all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from ast import literal_eval
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import bare
from configs import base
from experiment import Experiment, read_experiment
from parallel.huge_pages import use_huge_pages
from parallel.mesh import make_mesh
from training.optim import make_optimizer
from training.schedules import make_schedule
from training.state import create_state
from training.step import make_step

Batch = dict[str, Any]  # "tokens" and "targets", NumPy, int32 [B, T]
# One step with this batch: (its loss, seconds of wall clock, seconds of processors).
Step = Callable[[Batch], tuple[float, float, float]]

ONE = bare.Shape()
EIGHT = bare.Shape(vocab=8192, embed=256, layers=4, heads=8, mlp=1024, length=256, batch=16)
# name -> our mesh, the bare layout
LAYOUTS = {
    "fsdp8": ({"fsdp": 8}, bare.Layout(batch="fsdp", fsdp="fsdp")),
    "tp4xdp2": ({"data": 2, "tensor": 4}, bare.Layout(batch="data", tensor="tensor")),
}
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 3e-4, 0.1, 1.0
TOLERANCE = 1e-5  # relative: sums in another order, carried through a few steps of AdamW


def our_experiment(shape: bare.Shape, mesh: dict[str, int], changes: list[str]) -> Experiment:
    """What a user would write for this model."""
    config = base.get_config()
    config.model.update(
        vocab_size=shape.vocab,
        layers=shape.layers,
        embed_dim=shape.embed,
        mlp_dim=shape.mlp,
        heads=shape.heads,
        kv_heads=shape.heads,
        head_dim=shape.embed // shape.heads,
        max_length=shape.length,
        norm="layer",
        norm_eps=1e-5,
        positions="learned",
        activation="gelu_tanh",
        gated=False,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
    )
    if not mesh:
        config.model.unroll = shape.layers  # on one CPU a loop over layers costs copies
    config.mesh.update(mesh)
    config.data.update(sequence_length=shape.length, batch_size=shape.batch)
    config.optimizer.update(
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        clip_norm=CLIP_NORM,
        schedule="constant",
        warmup_steps=0,
    )
    for change in changes:
        key, value = change.split("=")
        config.update_from_flattened_dict({key: literal_eval(value)})
    return read_experiment(config, jax.device_count())


def ours(experiment: Experiment) -> tuple[Step, float, Any]:
    """The step that `train.py` runs: (it, its temporaries in MiB, the initial parameters)."""
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        model, precision = experiment.build_model(), experiment.precision
        optimizer = make_optimizer(
            experiment.optimizer, experiment.train.steps, model.trained(model.axes)
        )
        schedule = make_schedule(experiment.optimizer, experiment.train.steps)
        step_fn = make_step(model, optimizer, schedule, precision, seed=experiment.seed)
        state = create_state(model, optimizer, precision, experiment.seed, mesh)
        initial = jax.tree.map(np.asarray, state.params)
        sharding = NamedSharding(mesh, model.rules.spec("batch seq"))

        def arguments(batch: Batch) -> tuple[Any]:
            tokens = batch["tokens"]
            rows = {
                "segments": np.ones_like(tokens),
                "positions": np.broadcast_to(
                    np.arange(tokens.shape[1], dtype=np.int32), tokens.shape
                ),
            }
            return (jax.device_put(batch | rows, sharding),)

        data = experiment.data
        zeros = np.zeros((data.batch_size, data.sequence_length), np.int32)
        step, mib = compiled(step_fn, state, arguments, {"tokens": zeros, "targets": zeros})
    return step, mib, initial


def bare_jax(
    shape: bare.Shape, layout: bare.Layout, sizes: dict[str, int], initial: Any, unrolled: bool
) -> tuple[Step, float]:
    """The bare step: (it, its temporaries in MiB)."""
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto)
    with jax.set_mesh(mesh):
        optimizer = bare.optimizer(LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM)
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            layout.specs(),
            is_leaf=lambda s: isinstance(s, P),
        )
        params = jax.device_put(as_bare(initial), shardings)
        state = params, optimizer.init(params)  # moments are divided as their parameters
        rows = NamedSharding(mesh, P(layout.batch))

        def arguments(batch: Batch) -> tuple[Any, ...]:
            return tuple(jax.device_put((batch["tokens"], batch["targets"]), rows))

        zeros = np.zeros((shape.batch, shape.length), np.int32)
        step_fn = bare.make_step(optimizer, layout, unrolled)
        return compiled(step_fn, state, arguments, {"tokens": zeros, "targets": zeros})


def compiled(
    step_fn: Callable[..., Any], state: Any, arguments: Callable[[Batch], Any], example: Batch
) -> tuple[Step, float]:
    """A step that donates and keeps its state, and its temporaries in MiB."""
    program = jax.jit(step_fn, donate_argnums=0).lower(state, *arguments(example)).compile()

    def step(batch: Batch) -> tuple[float, float, float]:
        nonlocal state
        given = jax.block_until_ready(arguments(batch))
        wall, processors = time.perf_counter(), time.process_time()
        state, out = program(state, *given)
        jax.block_until_ready((state, out))
        wall, processors = time.perf_counter() - wall, time.process_time() - processors
        return float(out["loss"] if isinstance(out, dict) else out), wall, processors

    memory: Any = program.memory_analysis()
    return step, memory.temp_size_in_bytes / 2**20


def as_bare(params: Any) -> bare.Params:
    """Our parameters under the names of `bare.py`."""
    blocks = params["stack"]["blocks"]
    attention, mlp = blocks["attention"], blocks["mlp"]
    norm1, norm2 = blocks["attention_norm"], blocks["mlp_norm"]
    parts = ("query", "key", "value")
    return {
        "w_vocab": params["embedding"],
        "w_position": params["position"],
        "gain": params["final_norm"]["gain"],
        "bias": params["final_norm"]["bias"],
        "blocks": {
            "norm1_gain": norm1["gain"],
            "norm1_bias": norm1["bias"],
            "w_qkv": np.stack([attention[part] for part in parts], axis=2),
            "b_qkv": np.stack([attention[f"{part}_bias"] for part in parts], axis=1),
            "w_out": attention["out"],
            "b_out": attention["out_bias"],
            "norm2_gain": norm2["gain"],
            "norm2_bias": norm2["bias"],
            "w_up": mlp["up"],
            "b_up": mlp["up_bias"],
            "w_down": mlp["down"],
            "b_down": mlp["down_bias"],
        },
    }


def pytorch(python: str, shape: bare.Shape, initial: Any, folder: Path) -> Step:
    """The compiled step of `torch_gpt2.py` in a process of its own, idle between its turns."""
    weights: dict[str, Any] = {"heads": shape.heads} | {
        ".".join(k.key for k in path): w for path, w in jax.tree.leaves_with_path(as_bare(initial))
    }
    np.savez(folder / "weights.npz", **weights)
    script = str(Path(__file__).with_name("torch_gpt2.py"))
    recipe = [str(x) for x in (LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM)]
    child = subprocess.Popen(
        [python, script, str(folder), *recipe],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    to_child, from_child = child.stdin, child.stdout

    def step(batch: Batch) -> tuple[float, float, float]:
        np.savez(folder / "batch.npz", **batch)
        to_child.write("step\n")
        to_child.flush()
        answer = json.loads(from_child.readline())
        return answer["loss"], answer["wall"], answer["processors"]

    return step


def take_turns(
    steps: dict[str, Step], shape: bare.Shape, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall and processor seconds of every round by variant; a first round only warms up."""
    rng = np.random.default_rng(0)
    wall: dict[str, list[float]] = {name: [] for name in steps}
    processors: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        tokens = rng.integers(0, shape.vocab, (shape.batch, shape.length + 1), np.int32)
        batch = {"tokens": tokens[:, :-1].copy(), "targets": tokens[:, 1:].copy()}
        losses = {}
        for name, step in steps.items():
            losses[name], seconds, busy = step(batch)
            if number:
                wall[name].append(seconds)
                processors[name].append(busy)
        expected = losses["bare scanned"]
        for name, value in losses.items():
            assert abs(value - expected) <= TOLERANCE * expected, (number, name, losses)
        note = ", ".join(f"{name} {times[-1]:.2f}" for name, times in wall.items() if times)
        print(
            f"round {number}: loss {expected:.4f}; seconds {note or 'not counted'}", file=sys.stderr
        )
    return wall, processors


def report(
    layout: str,
    shape: bare.Shape,
    measured: tuple[dict[str, list[float]], dict[str, list[float]]],
    mib: dict[str, float],
    changes: list[str],
) -> None:
    """One JSON line a variant."""
    wall, processors = measured
    best = min((n for n in wall if n.startswith("bare")), key=lambda n: statistics.median(wall[n]))
    for name, times in wall.items():
        median = statistics.median(times)
        over = [a / b for a, b in zip(times, wall[best], strict=True)]
        busy = [a / b for a, b in zip(processors[name], processors[best], strict=True)]
        row = {
            "layout": layout,
            "variant": name,
            "median_seconds": round(median, 4),
            "least_seconds": round(min(times), 4),
            "tokens_per_second": round(shape.batch * shape.length / median, 1),
            "processor_seconds": round(statistics.median(processors[name]), 4),
            "temporary_mib": round(mib[name], 1) if name in mib else None,
            "ratio": round(statistics.median(over), 4),
            "processor_ratio": round(statistics.median(busy), 4),
            "best_bare": best,
            "rounds": len(times),
            "changes": changes if name == "ours" else [],
            "malloc": os.environ.get("GLIBC_TUNABLES", ""),
        }
        versions = {"jax": jax.__version__, "python": platform.python_version()}
        print(json.dumps(row | {"shape": vars(shape)} | versions), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--devices", type=int, default=1, choices=(1, 8))
    parser.add_argument(
        "--torch", metavar="PYTHON", help="a Python that has torch and transformers"
    )
    parser.add_argument("--layouts", nargs="+", choices=tuple(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="changes")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.devices)

    shape = ONE if args.devices == 1 else EIGHT
    one_device: dict[str, tuple[dict[str, int], bare.Layout]] = {"one device": ({}, bare.Layout())}
    chosen = one_device if args.devices == 1 else {name: LAYOUTS[name] for name in args.layouts}
    for name, (sizes, layout) in chosen.items():
        steps: dict[str, Step] = {}
        mib: dict[str, float] = {}
        our_step, our_mib, initial = ours(our_experiment(shape, sizes, args.changes))
        for unrolled in (False, True) if args.devices == 1 else (False,):
            variant = f"bare {'unrolled' if unrolled else 'scanned'}"
            steps[variant], mib[variant] = bare_jax(shape, layout, sizes, initial, unrolled)
        steps["ours"], mib["ours"] = our_step, our_mib
        with tempfile.TemporaryDirectory() as folder:
            if args.torch and args.devices == 1:
                steps["torch compiled"] = pytorch(args.torch, shape, initial, Path(folder))
            measured = take_turns(steps, shape, args.rounds)
        report(name, shape, measured, mib, args.changes)


if __name__ == "__main__":
    use_huge_pages()  # for all of them, PyTorch's process too
    main()
