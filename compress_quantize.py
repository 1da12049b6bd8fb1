"""`python -m compress quantize`: a run's matrices as codes and scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cli
import compress_flags

FLAGS = (
    cli.Flag("form", str, None, "int8, int4:128, int3:128, nf4:64, fp8, int8+int8, int8+int8="),
    compress_flags.ONLY,
    cli.Flag("mix", str, None, "forms with a comma between, of which each layer gets one ..."),
    cli.Flag("bits", float, None, "... so that matrices have so many bits a weight"),
    cli.Flag("method", str, "rtn", "rtn (nearest), gptq, awq or smoothquant"),
    cli.Flag("clip", str, "absmax", "what a scale covers: absmax or mse"),
    cli.Flag("ranges", str, "absmax", "one scale of all inputs: absmax, percentile or mse"),
    cli.Flag("percentile", float, 99.99, "of |x|, with --ranges=percentile"),
    cli.Flag("damp", float, 0.01, "of gptq: a part of the mean square of inputs"),
    cli.Flag("exponent", float, 0.5, "of smoothquant: how much moves to the weights"),
    *compress_flags.TEXT,
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
    from compress.budget import candidates, mixed  # here: a typo costs no import of JAX
    from compress.quantize import Quantize, quantize
    from compressing import finish, forms_of, opened

    chosen = Quantize(**how)
    if (form is None) == (mix is None) or (mix is None) != (bits is None):
        raise ValueError(
            "--form: missing; give --form=int4:128, or --mix=int8,int4:128 with --bits=4.5"
        )
    with opened(config, workdir, step, out) as run:
        flag = f"--form={form}" if form is not None else f"--mix={mix}"
        static = "=" in flag.partition("=")[2]
        read = chosen.calibrated or static  # text, to round by
        texts = [form] if form is not None else (mix or "").split(",")
        options = [forms_of(run, only, text, flag) for text in texts]
        every = [form for option in options for layers in option.values() for form in layers]
        chosen.check(every, flag)
        asked = chosen.method if chosen.calibrated else flag
        text = run.calibration(rows, seed, asked) if read or mix is not None else None
        forms = options[0]
        if bits is not None and text is not None:
            forms = mixed(candidates(run.model, run.params, text, options), bits)
        text = text if read else None
        of_model = (run.experiment.model, run.model, run.params)
        made = quantize(chosen, forms, *of_model, text, scratch=run.scratch)
        what = {"method": f"quantize {chosen.method}", "form": form or mix, "rows": rows}
        finish(run, made, out, what)
