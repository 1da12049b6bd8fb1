"""Every family on every kind of mesh, and through stages, against one device: 8 simulated ones.

    JAX_NUM_CPU_DEVICES=8 python benchmarks/family_layouts.py

Five steps of gradient descent in float32, dropout on, of the models and batches of
`tests/families.py`; what is kept of each case is told by `apart` in `tests/training/cells.py`.
Cases that are in the file already are not run again. The published ones were compiled with
XLA_FLAGS="--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false
--xla_cpu_parallel_codegen_split_count=1", in a third of the time; jax 0.10.2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.families import FAMILIES  # noqa: E402
from tests.training.cells import CELLS, apart, cells  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "family_layouts.jsonl"
MEASURED = ("loss", "gradient", "metrics")


def cases() -> Iterator[tuple[str, str]]:
    """(family, cell): with stages first, then those of most axes; the newest families first."""
    for cell in reversed(CELLS):
        for family in reversed(FAMILIES):
            if cell in cells(family):
                yield family, cell


def rows() -> dict[tuple[str, str], dict[str, Any]]:
    """What is in the file."""
    if not RESULT.exists():
        return {}
    found = [json.loads(line) for line in RESULT.read_text().splitlines()]
    return {(row["family"], row["cell"]): row for row in found}


def main() -> None:
    done = rows()
    for family, cell in cases():
        if (family, cell) in done:
            continue
        found = apart(family, **CELLS[cell])
        row = {"family": family, "cell": cell, "kind": CELLS[cell], **found}
        with RESULT.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(row, flush=True)
    for name in MEASURED:
        values = [row[name] for row in rows().values()]
        print(f"{name}: {len(values)} cases, largest difference {max(values):.1e}")


if __name__ == "__main__":
    main()
