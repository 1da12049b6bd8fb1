"""`python -m compress quantize`: a run's matrices as codes and scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cli

FLAGS = (
    cli.Flag("form", str, None, "int8, int4:128, int3:128, nf4:64, fp8, int8+int8, int8+int8="),
    cli.Flag("only", str, "stack/*", "a pattern of the matrices' names; the others stay"),
    cli.Flag("mix", str, None, "forms with a comma between, of which each layer gets one ..."),
    cli.Flag("bits", float, None, "... so that matrices have so many bits a weight"),
    cli.Flag("method", str, "rtn", "rtn (nearest), gptq, awq or smoothquant"),
    cli.Flag("clip", str, "absmax", "what a scale covers: absmax or mse"),
    cli.Flag("ranges", str, "absmax", "one scale of all inputs: absmax, percentile or mse"),
    cli.Flag("percentile", float, 99.99, "of |x|, with --ranges=percentile"),
    cli.Flag("damp", float, 0.01, "of gptq: a part of the mean square of inputs"),
    cli.Flag("exponent", float, 0.5, "of smoothquant: how much moves to the weights"),
    cli.Flag("rows", int, 64, "rows of the run's training text to calibrate on"),
    cli.Flag("seed", int, 0, "which rows those are"),
)


def main(
    config: Any,
    workdir: Path,
    out: Path,
    step: int | None,
    form: str | None,
    only: str,
    mix: str | None,
    bits: float | None,
    rows: int,
    seed: int,
    **how: Any,
) -> None:
    """The run, its forms, calibration text, codes, the new run."""
    import jax  # here: a typo on the command line costs no import

    from compress.budget import candidates, mixed
    from compress.quantize import Quantize, quantize
    from compressing import compressed_model, forms_of, opened, report, write_run

    chosen = Quantize(**how)
    if (form is None) == (mix is None) or (mix is None) != (bits is None):
        raise ValueError(
            "--form: missing; give --form=int4:128, or --mix=int8,int4:128 with --bits=4.5"
        )
    with opened(config, workdir, step, out) as run:
        static = "=" in (form or "") + (mix or "")
        text = chosen.calibrated or static or mix is not None
        batches = run.calibration(rows, seed, chosen.method) if text else []
        if form is not None:
            forms = forms_of(run, only, form, f"--form={form}")
        else:
            assert mix is not None
            assert bits is not None
            options = [forms_of(run, only, name, f"--mix={mix}") for name in mix.split(",")]
            forms = mixed(candidates(run.model, run.params, batches, options), bits)
        dense = sum(a.nbytes for a in jax.tree.leaves(run.params))
        of_model = (run.experiment.model, run.model, run.params)
        made = quantize(chosen, forms, *of_model, batches, scratch=run.scratch)
        values = {"config.weights.forms": made.forms()}
        new_config, model = compressed_model(run, values)
        params = made.finished(model, run.mesh)
        what = {"method": f"quantize {chosen.method}", "form": form or mix, "rows": rows}
        report(out, dense, write_run(run, new_config, params, out, what))
