"""Predicted against compiled bytes of prefill and decode: docs/memory-accuracy/inference.md.

    python benchmarks/inference_accuracy.py --compile
    python benchmarks/inference_accuracy.py          # the table again

A cell is a shipped shape on a target with a mesh, a ZeRO level, a batch, lengths and a cache, all
drawn by a seed. The constants of `memory/inference_constants.py` were chosen on cells of seed 1
and three by hand (benchmarks/results/inference_calibration.jsonl); those in the table are of seed
7. Where compilation would take minutes a shape has fewer layers than it ships with (`LAYERS`).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.memory_accuracy import SIZES, make_config  # noqa: E402
from compile_for import compile_for  # noqa: E402
from config_types import plain  # noqa: E402
from experiment import read_experiment  # noqa: E402
from inference import inference_job  # noqa: E402
from memory.inference import predict_inference, predicted_arguments  # noqa: E402
from memory.inference_job import PHASES, InferenceJob  # noqa: E402
from memory.plan import GIB  # noqa: E402
from parallel.targets import parse_target  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "inference_accuracy.jsonl"
TABLE = ROOT / "docs" / "memory-accuracy" / "inference.md"
TARGETS = {"gpu": ("gpu:h100:1x8",), "tpu": ("tpu:v5e:2x4", "tpu:v5p:2x2x2")}
SHAPES = (
    *("gpt2_124m", "qwen3_0_6b", "llama3_8b", "llama3_70b", "gemma3_1b", "mixtral_8x7b"),
    *("t5_small", "paligemma_like"),
)
# Layers that are compiled where those that are shipped would take minutes.
LAYERS = {
    "gpu": {"qwen3_0_6b": 14, "llama3_8b": 16, "llama3_70b": 8, "gemma3_1b": 12,
            "mixtral_8x7b": 4, "paligemma_like": 9},
    "tpu": {"gpt2_124m": 6, "qwen3_0_6b": 7, "llama3_8b": 6, "llama3_70b": 4, "gemma3_1b": 6,
            "mixtral_8x7b": 2, "paligemma_like": 4},
}  # fmt: skip
PROMPTS = {"gpt2_124m": (128, 512), "t5_small": (1,), "paligemma_like": (16, 64)}
SOURCES = {"t5_small": (128, 512)}
LEAST, MOST = GIB // 8, 0.8  # bytes of weights and cache, and their share of a device


def draw(rng: random.Random, shape: str, kind: str) -> dict[str, Any]:
    """A cell, which need not exist."""
    target = rng.choice(TARGETS[kind])
    devices = parse_target(target).device_count
    tensor = rng.choice((1, 2, 4, 8))
    rows, zero = rng.choice((1, 2, 4, 8, 16, 32)), rng.choice((0, 0, 3))
    cache = rng.choice(("contiguous", "contiguous", "paged"))
    overrides = {
        "mesh.data": 1,
        "mesh.fsdp": devices // tensor,
        "mesh.tensor": tensor,
        "parallel.zero": zero,
        "generate.batch_size": rows * devices // tensor,
        "generate.prompt_length": rng.choice(PROMPTS.get(shape, (512, 1024, 2048, 4096))),
        "generate.max_new_tokens": rng.choice((64, 128, 256)),
        "generate.cache": cache,
        "generate.cache_dtype": rng.choice(("compute", "compute", "int8")),
    }
    if shape in SOURCES:
        overrides["data.source_length"] = rng.choice(SOURCES[shape])
    if shape in LAYERS[kind]:
        overrides["model.layers"] = LAYERS[kind][shape]
    return {"shape": shape, "target": target, "overrides": overrides}


def cells(seed: int, kind: str, count: int) -> Iterator[dict[str, Any]]:
    """`count` cells of each shape that exist, whose weights and cache have a size that is worth
    predicting. Those are exact: a constant does not change what is drawn.
    """
    for shape in SHAPES:
        rng, found = random.Random(f"{seed} {kind} {shape}"), 0
        while found < count:
            cell = draw(rng, shape, kind)
            try:
                job = make_job(cell)
            except ValueError:
                continue
            chip = parse_target(cell["target"]).chip
            if LEAST <= predicted_arguments(job, chip) <= MOST * chip.memory:
                found += 1
                yield cell


def make_job(cell: dict[str, Any]) -> InferenceJob:
    """The job of a cell."""
    count = parse_target(cell["target"]).device_count
    config = make_config(cell["shape"], cell["overrides"])
    return inference_job(read_experiment(config, count, training=False))


def compile_cells(todo: list[dict[str, Any]], file: Path, timeout: float) -> None:
    """Compiles the cells one after another and appends each to `file`."""
    for cell in todo:
        config = plain(make_config(cell["shape"], cell["overrides"]))
        target = parse_target(cell["target"])
        answer = compile_for(config, target, mode="generate", timeout=timeout)
        programs = {
            phase: {name: sizes[name] for name in SIZES if name in sizes}
            for phase, sizes in answer.get("programs", {}).items()
        }
        said = {"status": answer["status"], "error": answer["error"], "programs": programs}
        with file.open("a") as out:
            out.write(json.dumps(cell | {"compiled": said}) + "\n")
        print(cell["target"], cell["shape"], answer["status"], answer["error"] or "", flush=True)


def read_cells(file: Path) -> list[dict[str, Any]]:
    """The cells of a file, those whose compilation failed left out."""
    if not file.is_file():
        return []
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row for row in rows if row["compiled"]["status"] != "failed"]


@dataclass(frozen=True)
class Error:
    """Predicted over compiled of one program of a cell, less one."""

    cell: dict[str, Any]
    phase: str
    total: float
    arguments: float
    predicted: int
    compiled: int
    part: str  # of the program that decides, by prediction


def errors(rows: list[dict[str, Any]]) -> list[Error]:
    """The error of every program, with the constants as they are now."""
    found = []
    for row in rows:
        prediction = predict_inference(make_job(row), parse_target(row["target"]).chip)
        for phase, compiled in row["compiled"]["programs"].items():
            said = prediction.programs[phase]
            found.append(
                Error(
                    row,
                    phase,
                    said.total_bytes / compiled["total_bytes"] - 1,
                    said.arguments / compiled["arguments"] - 1,
                    said.total_bytes,
                    compiled["total_bytes"],
                    said.part,
                )
            )
    return found


def summary(found: list[Error]) -> dict[str, Any]:
    """Median, 95th percentile and worst of the errors' sizes, in per cent."""
    total = sorted(100 * abs(e.total) for e in found)
    return {
        "programs": len(found),
        "median": statistics.median(total),
        "p95": total[math.ceil(0.95 * len(total)) - 1],
        "worst": total[-1],
        "arguments_worst": max(100 * abs(e.arguments) for e in found),
    }


def markdown(found: list[Error]) -> str:
    """A line for each group, then every program, worst first."""
    groups: dict[str, list[Error]] = {"all": found}
    for kind in ("gpu", "tpu"):
        for phase in PHASES:
            groups[f"{phase}, {kind}"] = [
                e for e in found if e.phase == phase and e.cell["target"].startswith(kind)
            ]
    for shape in SHAPES:
        groups[shape] = [e for e in found if e.cell["shape"] == shape]
    lines = ["# Predicted against compiled bytes: prefill and decode", "", SOURCE, ""]
    lines += ["| programs | number | median | 95th percentile | worst | arguments, worst |"]
    lines += ["| --- |" + " --- |" * 5]
    for name, group in groups.items():
        if group:
            s = summary(group)
            lines.append(
                f"| {name} | {s['programs']} | {s['median']:.1f}% | {s['p95']:.1f}% | "
                f"{s['worst']:.1f}% | {s['arguments_worst']:.2f}% |"
            )
    lines += ["", "| target | shape | program | layout | part | predicted GiB | compiled GiB | "]
    lines[-1] += "error |"
    lines.append("| --- |" + " --- |" * 7)
    for e in sorted(found, key=lambda e: -abs(e.total)):
        lines.append(
            f"| {e.cell['target']} | {e.cell['shape']} | {e.phase} | "
            f"{layout(e.cell['overrides'])} | {e.part} | {e.predicted / GIB:.3f} | "
            f"{e.compiled / GIB:.3f} | {100 * e.total:+.1f}% |"
        )
    return "\n".join(lines) + "\n"


def layout(overrides: dict[str, Any]) -> str:
    """A cell's overrides in a few words."""
    o = overrides
    axes = ("fsdp", "tensor")
    mesh = " ".join(f"{axis} {o[f'mesh.{axis}']}" for axis in axes if o[f"mesh.{axis}"] > 1)
    source = f"{o['data.source_length']} + " if "data.source_length" in o else ""
    length = f"{source}{o['generate.prompt_length']} + {o['generate.max_new_tokens']}"
    int8 = " int8" if o["generate.cache_dtype"] == "int8" else ""
    layers = f", {o['model.layers']} layers" if "model.layers" in o else ""
    return (
        f"{mesh}, zero {o['parallel.zero']}, {o['generate.batch_size']} x {length} tokens, "
        f"{o['generate.cache']}{int8}{layers}"
    )


SOURCE = (
    "Written by `python benchmarks/inference_accuracy.py`; every cell's raw figures are in "
    "benchmarks/results/inference_accuracy.jsonl. Bytes per device; the compiler's are arguments + "
    "outputs + temporaries - aliases, with jax 0.10.2, libtpu 0.0.42.1, cuDNN 9.10. The constants "
    "are of the cells of benchmarks/results/inference_calibration.jsonl; what lives together in a "
    "part (a gathered table without the logits) was once corrected after some of these were seen. "
    "The part is the one of the program that needs most, by prediction. Cells on which a compiler "
    "failed are in the file as failed and not here."
)


def main() -> None:
    """Draws, compiles what is missing, writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--gpu", type=int, default=2, help="cells of each shape on GPU")
    parser.add_argument("--tpu", type=int, default=1, help="and on TPU")
    parser.add_argument("--only", choices=("gpu", "tpu"), help="compile for these alone")
    parser.add_argument("--compile", action="store_true", help="compile the cells not yet there")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for one compilation")
    parser.add_argument("--cells", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, default=TABLE)
    options = parser.parse_args()
    if options.compile:
        done = [row | {"compiled": None} for row in read_cells(options.cells)]
        for kind in ("gpu", "tpu"):
            if options.only in (None, kind):
                drawn = list(cells(options.seed, kind, getattr(options, kind)))
                todo = [cell for cell in drawn if cell | {"compiled": None} not in done]
                compile_cells(todo, options.cells, options.timeout)
    found = errors(read_cells(options.cells))
    options.table.write_text(markdown(found))
    options.table.with_suffix(".json").write_text(json.dumps(summary(found), indent=1) + "\n")
    print(json.dumps(summary(found)))


if __name__ == "__main__":
    main()
