"""`python -m compress prune`: zeros in a run's matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cli
import compress_flags

FLAGS = (
    cli.Flag("sparsity", float, 0.5, "the share of zeros"),
    cli.Flag("method", str, "sparsegpt", "magnitude, wanda or sparsegpt"),
    cli.Flag("pattern", str, "unstructured", "unstructured or 2:4"),
    cli.Flag("scope", str, "layer", "of magnitude: layer, or global (one threshold)"),
    cli.Flag("packed", bool, False, "2:4 is stored packed, and frozen"),
    cli.Flag("damp", float, 0.01, "of sparsegpt: a part of the mean square of inputs"),
    compress_flags.ONLY,
    *compress_flags.TEXT,
)
ABOUT = "Weights made zero: magnitude, Wanda, SparseGPT; 2:4."


def main(
    config: Any,
    workdir: Path,
    out: Path,
    step: int | None,
    only: str,
    rows: int,
    seed: int,
    **how: Any,
) -> None:
    """The run, calibration text, zeros, the new run."""
    from compress.prune_layers import Prune, prune  # here: a typo costs no import of JAX
    from compressing import finish, forms_of, opened

    chosen = Prune(**how)
    with opened(config, workdir, step, out) as run:
        names = list(forms_of(run, only, "int8", f"--only={only}"))  # its matrices
        text = run.calibration(rows, seed, chosen.method) if chosen.calibrated else None
        made = prune(chosen, names, run.model, run.params, text, scratch=run.scratch)
        what = {"method": f"prune {chosen.method}", "sparsity": chosen.sparsity, "rows": rows}
        finish(run, made, out, what)
    if not chosen.packed:
        print("zeros save nothing yet: see docs/pruning.md for what removes them")
