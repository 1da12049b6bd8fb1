"""Every schedule on every kind of mesh against the unpipelined step, on 8 simulated devices.

    JAX_NUM_CPU_DEVICES=8 python benchmarks/pipeline_equality.py

Float32, dropout on, rows of packed documents and padding, the same micro-batches on one device.
Kept of each case: the loss's relative difference, and the largest difference of a gradient as a
share of max(its norm, 1e-3 of the norm of all). Each schedule in its first form on all meshes, in
its others on two. With `curve` ten steps of AdamW instead, and the
largest relative difference of a loss. Cases that are in the file already are not run again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from parallel.pipeline import PipelineConfig  # noqa: E402
from parallel.schedule_kinds import FORMS  # noqa: E402
from tests.small import DECODER  # noqa: E402
from tests.training.stages import (  # noqa: E402
    one_device,
    shares,
    step,
    ten_losses,
    ten_on_one_device,
)

RESULT = ROOT / "benchmarks" / "results" / "pipeline_equality.jsonl"
MEASURED = ("loss", "gradient", "losses")
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
    loss = abs(float(got[0]["loss"] / want[0]["loss"]) - 1)
    return {"loss": loss, "gradient": max(shares(got[1], want[1]).values())}


def same(row: dict[str, Any], case: dict[str, Any]) -> bool:
    return all(
        row.get(key) == case.get(key) for key in ("schedule", "form", "mesh", "remat", "curve")
    )


def main() -> None:
    done = [json.loads(line) for line in RESULT.read_text().splitlines()] if RESULT.exists() else []
    for case in cases():
        if any(same(row, case) for row in done):
            continue
        row = case | run(case)
        done.append(row)
        with RESULT.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(row, flush=True)
    for name in MEASURED:
        values = [row[name] for row in done if name in row]
        print(f"{name}: {len(values)} cases, largest difference {max(values):.1e}")


if __name__ == "__main__":
    main()
