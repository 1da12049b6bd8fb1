"""Every schedule on every kind of mesh against the unpipelined step, on 8 simulated devices.

    JAX_NUM_CPU_DEVICES=8 python benchmarks/pipeline_equality.py --out=benchmarks/results

Float32, dropout on, rows of packed documents and padding, the same micro-batches on one device.
Kept of each case: the loss's relative difference, and the largest difference of a gradient as a
share of max(its norm, 1e-3 of the norm of all). Each schedule in its first form on all meshes, in
its others on two. With `curve` ten steps of AdamW instead, and the
largest relative difference of a loss. Cases that are in the file already are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402

from parallel.pipeline import PipelineConfig  # noqa: E402
from parallel.schedule_kinds import FORMS  # noqa: E402
from tests.small import DECODER  # noqa: E402
from tests.training.test_pipeline import (  # noqa: E402
    norm,
    one_device,
    step,
    ten_losses,
    ten_on_one_device,
)

MICROBATCHES, ROWS = 8, 32
MESHES: tuple[dict[str, Any], ...] = (
    dict(pipe=2, data=4),
    dict(pipe=2, fsdp=4, zero=3),
    dict(pipe=2, tensor=4, sequence=True),
    dict(pipe=2, data=2, fsdp=2, zero=2),
    dict(pipe=2, fsdp=2, tensor=2, zero=3, sequence=True),
    dict(pipe=4, data=2),
    dict(pipe=4, fsdp=2, zero=1),
    dict(pipe=4, tensor=2),
    dict(pipe=8),
)
CURVES = (MESHES[4], MESHES[5])


def cases() -> Iterator[dict[str, Any]]:
    for mesh in MESHES:
        for schedule in FORMS:
            for remat in ("none", "full"):
                yield {"schedule": schedule, "mesh": mesh, "remat": remat}
    for mesh in CURVES:
        for schedule, forms in FORMS.items():
            for form in forms[1:]:
                for remat in ("none", "full"):
                    yield {"schedule": schedule, "form": form, "mesh": mesh, "remat": remat}
    for mesh in CURVES:
        for schedule in FORMS:
            yield {"schedule": schedule, "mesh": mesh, "remat": "none", "curve": True}


def run(case: dict[str, Any]) -> dict[str, float]:
    mesh = dict(case["mesh"])
    config = replace(DECODER, layers=2 * max(mesh["pipe"], 4))  # two chunks a stage
    form = case.get("form", "")
    pipeline = PipelineConfig(schedule=case["schedule"], microbatches=MICROBATCHES, form=form)
    kind = {"config": config, "rows": ROWS, "remat": case["remat"]}
    if case.get("curve"):
        want = ten_on_one_device(MICROBATCHES, config, ROWS)
        got = ten_losses(MICROBATCHES, pipeline=pipeline, **kind, **mesh)
        return {"losses": max(abs(g / w - 1) for g, w in zip(got, want, strict=True))}
    want = one_device(MICROBATCHES, config, ROWS)
    got = step(MICROBATCHES, pipeline=pipeline, **kind, **mesh)
    floor = 1e-3 * norm(want[1])
    shares = (
        norm(g - w) / max(norm(w), floor)
        for g, w in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True)
    )
    return {"loss": abs(float(got[0]["loss"] / want[0]["loss"]) - 1), "gradient": max(shares)}


def same(row: dict[str, Any], case: dict[str, Any]) -> bool:
    return all(
        row.get(key) == case.get(key) for key in ("schedule", "form", "mesh", "remat", "curve")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    file = parser.parse_args().out / "pipeline_equality.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for case in cases():
        if any(same(row, case) for row in done):
            continue
        row = case | run(case)
        done.append(row)
        with file.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(row, flush=True)
    for name in ("loss", "gradient", "losses"):
        values = [row[name] for row in done if name in row]
        print(f"{name}: {len(values)} cases, largest difference {max(values):.1e}")


if __name__ == "__main__":
    main()
