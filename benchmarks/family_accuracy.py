"""Predicted against compiled bytes of model families: the table docs/memory-accuracy/families.md.

    python benchmarks/family_accuracy.py --compile
    python benchmarks/family_accuracy.py          # the table again

As `benchmarks/memory_accuracy.py` has it of decoders: cells drawn by a seed, here a few for each
model and kind of chip. The cells in the table are of the seeds 1 and 7.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.memory_accuracy import (  # noqa: E402
    Error,
    compile_cells,
    errors,
    make_job,
    read_cells,
)
from memory.plan import GIB  # noqa: E402
from memory.terms import Terms  # noqa: E402
from parallel.targets import parse_target  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "family_accuracy.jsonl"
TABLE = ROOT / "docs" / "memory-accuracy" / "families.md"
HOST = {"gpu": ("gpu:h100:1x8",), "tpu": ("tpu:v5e:2x4", "tpu:v5p:2x2x2")}
HOSTS = {"gpu": ("gpu:h100:2x8", "gpu:h100:8x8"), "tpu": ("tpu:v5p:4x4x4",)}
REMAT = ("none", "full", "dots", "attention")


@dataclass(frozen=True)
class Shape:
    """A model: a shipped config with changes, and what of its layout is drawn.

    Attributes:
      lengths: (source, row), of which one pair is drawn; 0 leaves the config's own.
      targets: kind of chip -> names.
      expert: sizes of that axis.
      stages: schedules of a pipeline of two stages; none: no pipeline.
    """

    config: str
    changes: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[tuple[int, int], ...] = ((0, 0),)
    targets: dict[str, tuple[str, ...]] = field(default_factory=lambda: HOST)
    expert: tuple[int, ...] = (1,)
    stages: tuple[str, ...] = ()


VIT_BASE = {
    "model.layers": 12,
    "model.embed_dim": 768,
    "model.mlp_dim": 3072,
    "model.heads": 12,
    "model.kv_heads": 12,
    "model.head_dim": 64,
    "model.max_length": 196,
    "vision.image_size": 224,
    "vision.patch_size": 16,
    "vision.channels": 3,
    "objective.tasks": '{"kind": 1000}',
    "data.source": "images",
    "data.path": "corpus/*.jsonl",
    "data.sequence_length": 196,
}
T5_LENGTHS = ((512, 128), (512, 512), (256, 256))
GATED = {"model.cross": "gated"}
SHAPES = {
    "BERT-base": Shape("bert_base", lengths=((0, 128), (0, 512))),
    "BERT-base, one shared block": Shape(
        "bert_base", {"model.distinct": 1, "model.embed_rank": 128}, ((0, 128), (0, 512))
    ),
    "GPT-2, six shared blocks": Shape("gpt2_124m", {"model.distinct": 6}),
    "T5 small": Shape("t5_small", lengths=T5_LENGTHS),
    "T5 small, two stages": Shape("t5_small", lengths=T5_LENGTHS, stages=("1f1b", "zb_h1")),
    "Transformer of 2017": Shape("transformer_2017_base", lengths=((128, 128), (256, 256))),
    "ViT-B/16": Shape("tiny_digits", VIT_BASE),
    "PaliGemma": Shape("paligemma_like", lengths=((0, 64), (0, 256))),
    "PaliGemma, gated": Shape("paligemma_like", GATED, ((0, 64), (0, 256))),
    "PaliGemma, gated, two stages": Shape(
        "paligemma_like", GATED, ((0, 64), (0, 256)), stages=("1f1b", "interleaved")
    ),
    "Mixtral 8x7B": Shape(
        "mixtral_8x7b", lengths=((0, 2048), (0, 4096)), targets=HOSTS, expert=(1, 4, 8)
    ),
    "Qwen 3 30B-A3B": Shape(
        "qwen3_30b_a3b", lengths=((0, 2048), (0, 4096)), targets=HOSTS, expert=(1, 4, 8)
    ),
}


def draw(rng: random.Random, shape: Shape, kind: str) -> tuple[str, dict[str, Any]]:
    """A target and overrides, which need not exist."""
    target = rng.choice(shape.targets[kind])
    devices = parse_target(target).device_count
    pipe = 2 if shape.stages else 1
    expert = rng.choice(shape.expert)
    tensor = rng.choice((1, 1, 2, 4))
    data = rng.choice((1, 1, 2, 4, 8))
    micro = rng.choice((4, 8)) if shape.stages else rng.choice((1, 1, 1, 2, 4))
    rows = rng.choice((2, 4, 8, 16, 32))
    source, length = rng.choice(shape.lengths)
    params, compute = rng.choice(
        (("float32", "bfloat16"),) * 3 + (("bfloat16",) * 2, ("float32",) * 2)
    )
    overrides = shape.changes | {
        "mesh.data": data,
        "mesh.fsdp": devices // (pipe * expert * tensor * data),
        "mesh.pipe": pipe,
        "mesh.expert": expert,
        "mesh.tensor": tensor,
        "parallel.zero": rng.choice((3, 3, 2, 1, 0)),
        "parallel.sequence": tensor > 1 and rng.random() < 0.5,
        "remat.policy": rng.choice(REMAT),
        "precision.params": params,
        "precision.compute": compute,
        "data.batch_size": rows * micro * devices // (pipe * tensor),
    }
    if shape.stages:
        overrides |= {
            "pipeline.microbatches": micro,
            "pipeline.schedule": rng.choice(shape.stages),
        }
    else:
        overrides["train.grad_accumulation"] = micro
    if source:
        overrides["data.source_length"] = source
    if length:
        overrides["data.sequence_length"] = length
    return target, overrides


def cells(seed: int, kind: str, count: int) -> Iterator[dict[str, Any]]:
    """`count` cells of each model that exist, whose state, gradients and saved tensors could fit
    and are half a GiB or more. No fitted constant is in those: it does not change what is drawn.
    """
    for model, shape in SHAPES.items():
        rng = random.Random(f"{seed} {kind} {model}")
        found = 0
        while found < count:
            target, overrides = draw(rng, shape, kind)
            try:
                job = make_job(shape.config, target, overrides)
            except ValueError:
                continue
            chip = parse_target(target).chip
            terms = Terms(job, chip)
            saved = [terms.saved] + ([terms.encoder.saved] if terms.encoder else [])
            stored = (
                terms.master / job.mesh.pipe
                + sum(sum(parts) for parts in terms.moments.values()) / job.mesh.pipe
                + terms.copy
                + terms.layer_gradients
                + sum(sum(tensors.values()) for tensors in saved)
            )
            if GIB / 2 <= stored <= chip.memory:
                found += 1
                yield {
                    "model": model,
                    "shape": shape.config,
                    "target": target,
                    "overrides": overrides,
                }


def layout(overrides: dict[str, Any]) -> str:
    """A cell's layout in a few words."""
    o = overrides
    axes = ("data", "fsdp", "pipe", "expert", "tensor")
    mesh = " ".join(f"{axis} {o[f'mesh.{axis}']}" for axis in axes if o[f"mesh.{axis}"] > 1)
    sequence = " sequence" if o["parallel.sequence"] else ""
    if "pipeline.schedule" in o:
        parts = f"{o['pipeline.schedule']} of {o['pipeline.microbatches']} micro-batches"
    else:
        parts = f"{o['train.grad_accumulation']} micro-steps"
    length = o.get("data.sequence_length", 1024)
    source = f"{o['data.source_length']} + " if "data.source_length" in o else ""
    return (
        f"{mesh}{sequence}, zero {o['parallel.zero']}, remat {o['remat.policy']}, "
        f"{o['precision.params']}/{o['precision.compute']}, {o['data.batch_size']} x "
        f"{source}{length}, {parts}"
    )


def markdown(found: list[Error]) -> str:
    """A line for each model and kind of chip, then the cells, worst first."""
    lines = ["# Predicted against compiled bytes: families", "", SOURCE, ""]
    groups: dict[str, list[Error]] = {"all": found}
    for kind in ("gpu", "tpu"):
        groups[kind] = [e for e in found if e.cell["target"].startswith(kind)]
    for model in SHAPES:
        groups[model] = [e for e in found if e.cell["model"] == model]
    lines.append("| cells | number | within 10% | median | worst | median of temporaries |")
    lines.append("| --- |" + " --- |" * 5)
    for name, group in groups.items():
        if not group:
            continue
        total = [100 * abs(e.total) for e in group]
        temporaries = statistics.median(100 * abs(e.temporaries) for e in group)
        lines.append(
            f"| {name} | {len(group)} | {sum(t <= 10 for t in total)} | "
            f"{statistics.median(total):.1f}% | {max(total):.1f}% | {temporaries:.1f}% |"
        )
    lines += ["", "| target | model | layout | phase | predicted GiB | compiled GiB | error | "]
    lines[-1] += "temporaries | arguments |"
    lines.append("| --- |" + " --- |" * 8)
    for e in sorted(found, key=lambda e: -abs(e.total)):
        row, compiled = e.cell, e.cell["compiled"]
        lines.append(
            f"| {row['target']} | {row['model']} | {layout(row['overrides'])} | {e.phase} | "
            f"{e.predicted / GIB:.2f} | {compiled['total_bytes'] / GIB:.2f} | "
            f"{100 * e.total:+.1f}% | {100 * e.temporaries:+.1f}% | "
            f"{100 * e.arguments:+.2f}% |"
        )
    return "\n".join(lines) + "\n"


SOURCE = (
    "Written by `python benchmarks/family_accuracy.py`; every cell's raw figures are in "
    "benchmarks/results/family_accuracy.jsonl. Bytes per device; [README.md](README.md) says how "
    "they are counted. No constant was fitted to these cells. The phase is the one that decides by "
    "prediction. Cells on which a compiler failed or exceeded its time are in the file as failed "
    "and not here."
)


def main() -> None:
    """Draws, compiles what is missing, writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--gpu", type=int, default=1, help="cells of each model on GPU")
    parser.add_argument("--tpu", type=int, default=1, help="and on TPU")
    parser.add_argument("--compile", action="store_true", help="compile the cells not yet there")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for one compilation")
    parser.add_argument("--cells", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, default=TABLE)
    options = parser.parse_args()
    if options.compile:
        done = [row | {"compiled": None} for row in read_cells(options.cells)]
        for kind in ("gpu", "tpu"):
            drawn = list(cells(options.seed, kind, getattr(options, kind)))
            todo = [cell for cell in drawn if cell | {"compiled": None} not in done]
            compile_cells(todo, options.cells, options.timeout)
    found = errors(read_cells(options.cells))
    options.table.write_text(markdown(found))
    total = [abs(e.total) for e in found]
    print(
        json.dumps({"cells": len(found), "median": statistics.median(total), "worst": max(total)})
    )


if __name__ == "__main__":
    main()
