"""`python -m compress factorize`: a run's matrices as two factors each, its tables too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cli
import compress_flags

FLAGS = (
    cli.Flag("rank", int, None, "of every matrix ..."),
    cli.Flag("keep", float, None, "... or the part of all their bytes that is kept, shared out"),
    compress_flags.ONLY,
    cli.Flag("embedding_rank", int, None, "of the vocabulary's tables; default: they stay"),
    cli.Flag("method", str, "whitened", "svd, whitened (SVD-LLM) or asvd"),
    cli.Flag("exponent", float, 0.5, "of asvd"),
    *compress_flags.TEXT,
)


def main(
    config: Any,
    workdir: Path,
    out: Path,
    step: int | None,
    rank: int | None,
    keep: float | None,
    only: str,
    embedding_rank: int | None,
    rows: int,
    seed: int,
    **how: Any,
) -> None:
    """The run, its ranks, calibration text, factors, the new run."""
    from compress.budget import mixed
    from compress.factorize import Factorize, factorize, rank_candidates
    from compress.tables import factor_tables
    from compressing import finish, forms_of, opened
    from training.naming import named

    chosen = Factorize(**how)
    if rank is not None and keep is not None:
        raise ValueError(f"--keep={keep}: with --rank={rank} there is nothing to share out")
    if rank is None and keep is None and embedding_rank is None:
        raise ValueError("--rank: missing; give --rank=64, --keep=0.7 or --embedding_rank=64")
    if keep is not None and not 0 < keep < 1:
        raise ValueError(f"--keep={keep}: a part of the bytes, between 0 and 1")
    with opened(config, workdir, step, out) as run:
        arrays = named(run.params)
        forms: dict[str, Any] = {}
        calibrated = (chosen.method != "svd" and rank is not None) or keep is not None
        text = run.calibration(rows, seed, chosen.method) if calibrated else None
        if rank is not None:
            forms = forms_of(run, only, f"rank:{rank}", f"--rank={rank}")
        elif keep is not None and text is not None:
            names = list(forms_of(run, only, "rank:1", f"--only={only}"))
            found = rank_candidates(chosen, names, run.model, run.params, text)
            forms = mixed(found, 32 * keep, flag="keep")
        text = text if forms else None
        made = factorize(chosen, forms, run.model, run.params, text, scratch=run.scratch)
        values: dict[str, Any] = {}
        if embedding_rank is not None:
            for name, array in factor_tables(run.experiment.model, arrays, embedding_rank).items():
                made.put_array(name, array)
            values["config.model.embed_rank"] = embedding_rank
        what = {"method": f"factorize {chosen.method}", "rank": rank, "keep": keep, "rows": rows}
        finish(run, made, out, what, values)
