"""Says where every byte of a training step goes on a target, what the step costs, and what to
change if it does not fit; of generation and evaluation where every byte goes, and the largest batch
and length that fit. Nothing is run, and the target need not be here.

    python plan.py --config=configs/llama3_8b.py --target=gpu:h100:1x8
    python plan.py --config=configs/llama3_8b.py --target=tpu:v5p:4x4x4 --compile --html=plan.html
    python plan.py --config=configs/llama3_8b.py --target=gpu:h100:1x8 --mode=generate
    JAX_NUM_CPU_DEVICES=8 python plan.py --config=configs/tiny.py --target=cpu:8 --measure

--compile runs the target's own compiler (extras gpu-target, tpu-target); --measure runs a few steps
on the devices that are here.
"""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Any

import cli


def main(
    config: Any,
    *,
    target: str,
    mode: str,
    compile: bool,
    measure: bool,
    budget_gib: float | None,
    json: Path | None,
    html: Path | None,
) -> None:
    """Target, prediction, the other grades, what would help, files."""
    from config_border import with_values
    from config_types import plain
    from experiment import read_experiment
    from memory.pipeline_figures import pipeline_figures
    from memory.plan import GIB, budget_for, limit_for, plan, remedies, together
    from memory.plan_text import describe
    from parallel.targets import parse_target

    aim = parse_target(target)
    limit = limit_for(aim, budget_gib)
    for flag, file in (("json", json), ("html", html)):
        if file is not None and file.is_dir():
            raise ValueError(f"--{flag}={file}: a folder; give a file")
    if compile:
        aim.check_compiler("leave --compile out")
    if mode != "train":
        if measure:
            raise ValueError(f"--measure: a few steps of training; leave it out with --mode={mode}")
        return other_mode(config, aim, mode, limit, compile, json, html)
    if measure:
        check_here(aim)
    experiment = read_experiment(config, aim.device_count)
    job = experiment.job()

    # --- The grades -------------------------------------------------------------------------------
    row = plan(job, aim, name=experiment.describe_layout(), overrides={}, limit_bytes=limit)
    staged = pipeline_figures(job, aim, row["predicted"]["phases"])
    row["pipeline"] = staged.grade() if staged else None
    buffers, timeline, notes = [], [], []
    if compile:
        from compile_for import compile_for

        answer = compile_for(plain(config), aim)
        buffers, timeline = answer.pop("buffers", []), answer.pop("timeline", [])
        row |= {"compiled": answer, "status": answer["status"], "error": answer["error"]}
        if answer["status"] != "failed":
            row["fits"] = answer["status"] == "ok" and answer["total_bytes"] <= limit
            row["status"] = "ok" if row["fits"] else "does not fit"
    if measure:
        from memory.measure import is_out_of_memory
        from memory.measured import measure_step

        try:
            row["measured"] = measure_step(job)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            notes = ["--measure: the devices here ran out of memory"]

    # --- What would help --------------------------------------------------------------------------
    def change(overrides: dict[str, Any]) -> Any:
        return read_experiment(with_values(config, overrides), aim.device_count).job()

    row["remedies"], row["together"], least = [], None, ""
    if not row["fits"]:
        # Where the compiler needs more than is predicted, so will what helps.
        predicted = row["predicted"]["total_bytes"]
        more = max(1.0, (row["compiled"] or {}).get("total_bytes", 0) / predicted)
        row["remedies"] = [str(r) for r in remedies(job, aim, int(limit / more), change)]
        most = together(job, aim, int(limit / more), change)
        row["together"] = str(most) if most.fits else None
        flags = " ".join(most.flags()) or "this config"
        least = f"{budget_for((predicted - most.saves) * more)} GiB with {flags}"

    # --- Out --------------------------------------------------------------------------------------
    print(describe(row, job, aim))
    for note in [*experiment.without_effect(aim.chip.kind), *notes]:
        print(f"note: {note}")
    if json:
        write("json", json, dumps(row, indent=1) + "\n")
    if html:
        from memory.report import plan_html

        write("html", html, plan_html(row, timeline, buffers, staged.drawing() if staged else ""))
    if row["status"] == "failed":
        raise ValueError(f"--compile: the compiler of --target={target} failed: {row['error']}")
    if not row["fits"] and not row["together"]:
        raise ValueError(
            f"--budget_gib={limit / GIB:.4g}: nothing that this planner knows fits; the least is "
            f"{least}; take that, or more devices"
        )


def other_mode(
    config: Any,
    aim: Any,
    mode: str,
    limit: int,
    compile: bool,
    json: Path | None,
    html: Path | None,
) -> None:
    """Evaluation or generation: prediction, compiled programs, what would help, files."""
    from inference_plan import does_not_fit, mode_plan

    row, text, drawn = mode_plan(config, aim, mode, limit, compile=compile)
    print(text)
    if json:
        write("json", json, dumps(row, indent=1) + "\n")
    if html:
        from memory.report import plan_html

        write("html", html, plan_html(row, drawn.get("timeline", []), drawn.get("buffers", [])))
    if (why := does_not_fit(row)) is not None:
        raise ValueError(why)


def check_here(aim: Any) -> None:
    """Raises ValueError where the devices that are here are not the target's."""
    import jax

    from parallel.chips import chip_of

    here = jax.devices()
    same = aim.chip.kind == "cpu" or chip_of(here[0].device_kind) == aim.chip
    if not same or (here[0].platform, len(here)) != (aim.chip.kind, aim.device_count):
        raise ValueError(
            f"--measure: --target={aim.name} is not here: there are {len(here)} x "
            f"{here[0].device_kind}; leave --measure out"
            + (f", or set JAX_NUM_CPU_DEVICES={aim.device_count}" if aim.chip.kind == "cpu" else "")
        )


def write(flag: str, file: Path, text: str) -> None:
    """Writes a file and its folder."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    except OSError as error:
        why = f"--{flag}={file}: {error.strerror}; give a file that you may write"
        raise ValueError(why) from error
    print(f"written: {file}")


FLAGS = (
    cli.Flag("target", str, None, "devices, such as gpu:h100:1x8 or tpu:v5e:4x4", required=True),
    cli.Flag("mode", str, "train", "what is planned", ("train", "evaluate", "generate")),
    cli.Flag("compile", bool, False, "compile the step for the target"),
    cli.Flag("measure", bool, False, "run a few steps on the devices that are here"),
    cli.Flag("budget_gib", float, None, "GiB per device, if not all of its memory"),
    cli.Flag("json", Path, None, "write the plan to this file"),
    cli.Flag("html", Path, None, "draw the plan into this file"),
)

if __name__ == "__main__":
    cli.run(
        main, name="plan.py", about=__doc__, config_from="file", flags=FLAGS, needs_workdir=False
    )
