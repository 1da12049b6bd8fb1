"""The plan of generation and of evaluation: `plan.py --mode`, and what generate.py asks first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from config_border import with_values
from config_types import plain
from experiment import Experiment, read_experiment
from inference import inference_job
from memory.evaluation import predict_evaluation
from memory.inference import InferencePrediction, predict_inference
from memory.inference_fit import Change, changes, largest
from memory.inference_job import InferenceJob
from memory.plan import GIB, Row, budget_for, gib
from memory.plan_text import table, verdict
from parallel.targets import Target, local_target

MODES = ("train", "evaluate", "generate")


def inference_plan(
    experiment: Experiment, prompt: int, source: int, target: Target, limit: int = 0
) -> Row:
    """The row of generation, predicted, as `memory.plan` describes rows.

    Args:
      prompt, source: tokens of the longest; 0: as `inference.inference_job` says.
      limit: bytes per device; 0: all that the device has.

    Raises:
      ValueError: of `inference.inference_job`.
    """
    job = inference_job(experiment, prompt, source)
    prediction = predict_inference(job, target.chip)
    grade = {
        "total_bytes": prediction.total_bytes,
        "components": prediction.components,
        "phases": {name: program.total_bytes for name, program in prediction.programs.items()},
    }
    row = _row("generate", experiment.describe_layout(), target, limit, grade)
    found = largest(job, target.chip, row["limit_bytes"])
    return row | {
        "largest": {"batch_size": found.rows, "tokens": found.slots},
        "summary": _summary(job, prediction),
    }


def _row(mode: str, name: str, target: Target, limit: int, grade: dict[str, Any]) -> Row:
    limit = limit or target.chip.memory
    fits = grade["total_bytes"] <= limit
    row: Row = {"mode": mode, "name": name, "overrides": {}, "target": target.name}
    row |= {"limit_bytes": limit, "fits": fits, "status": "ok" if fits else "does not fit"}
    row |= {"predicted": grade, "compiled": None, "measured": None, "error": None}
    return row | {"remedies": [], "together": None}


def _summary(job: InferenceJob, prediction: InferencePrediction) -> str:
    """One line: what is needed, and what weights and cache are of it."""
    held = dict(prediction.held)
    weights, kept = held.pop("weights"), sum(held.values())
    return (
        f"{gib(prediction.total_bytes)} GiB per device predicted (weights {gib(weights)}, cache "
        f"{gib(kept)}, {prediction.decides} decides) for {job.shape.rows} x "
        f"{job.shape.slots:,} tokens"
    )


def fits_here(
    config: ConfigDict, prompt: int, source: int, say: Callable[[str], None]
) -> Row | None:
    """What generate.py asks before it allocates; None where nobody has described the devices.

    Args:
      say: prints a line for a person.

    Raises:
      ValueError: it cannot fit (`config.memory.check`), saying what would.
    """
    try:
        target = local_target()
    except ValueError as error:
        say(f"plan: none, {error}")
        return None
    experiment = read_experiment(config, target.device_count, training=False)
    settings = experiment.memory
    limit = int(settings.budget_gib * GIB)
    row = inference_plan(experiment, prompt, source, target, limit)
    say(f"plan: {row['summary']}")
    if row["fits"] or settings.check == "off":
        return row
    helps = _changes(config, experiment, prompt, source, target, row["limit_bytes"])
    would = next((str(change) for change in helps if change.fits), "no one change is enough")
    line = f"{verdict(row)}; {would}; plan.py --mode=generate says more"
    if settings.check == "refuse":
        raise ValueError(f"{line}; config.memory.check=warn runs it all the same")
    say(f"warning: {line}")
    return row


def _changes(
    config: ConfigDict,
    experiment: Experiment,
    prompt: int,
    source: int,
    target: Target,
    limit: int,
) -> list[Change]:
    job = inference_job(experiment, prompt, source)

    def change(overrides: dict[str, Any]) -> InferenceJob:
        count = target.device_count
        other = read_experiment(with_values(config, overrides), count, training=False)
        shorter = overrides.get("config.generate.prompt_length", 0)
        return inference_job(other, shorter or job.prompt, source)

    return changes(job, target.chip, limit, change)


def mode_plan(
    config: ConfigDict, target: Target, mode: str, limit: int, *, compile: bool
) -> tuple[Row, str, dict[str, Any]]:
    """The row of `plan.py --mode=evaluate` or `generate`, its text, and what is drawn of it.

    Raises:
      ValueError: a config that cannot be, or a compiler that failed.
    """
    experiment = read_experiment(config, target.device_count, training=False)
    lines, drawn = [f"{target.name}: {target.device_count} devices; "], {}
    if mode == "generate":
        row = inference_plan(experiment, 0, 0, target, limit)
        shape = inference_job(experiment).shape
        what = f"generation: {shape.rows} rows of {shape.slots:,} tokens"
    else:
        prediction = predict_evaluation(experiment.job(), target.chip)
        grade = {"total_bytes": prediction.total_bytes, "components": prediction.components}
        grade["phases"] = {n: prediction.arguments + b for n, b in prediction.phases.items()}
        row = _row(mode, experiment.describe_layout(), target, limit, grade)
        data = experiment.data
        what = f"evaluation: {data.batch_size} x {data.sequence_length} tokens a step"
    if compile:
        from compile_for import compile_for

        answer = compile_for(plain(config), target, mode=mode)
        drawn = {name: answer.pop(name, []) for name in ("timeline", "buffers")}
        if answer["status"] == "failed":
            raise ValueError(f"--compile: the compiler of {target.name} failed: {answer['error']}")
        fits = answer["status"] == "ok" and answer["total_bytes"] <= row["limit_bytes"]
        row |= {"compiled": answer, "error": answer["error"], "fits": fits}
        row["status"] = "ok" if fits else "does not fit"
    if not row["fits"] and mode == "generate":
        helps = _changes(config, experiment, 0, 0, target, row["limit_bytes"])
        row["remedies"] = [str(change) for change in helps]
    lines[0] += row["name"]
    lines += [what, "", *table(row), *_programs(row), "", verdict(row)]
    if mode == "generate":
        found = row["largest"]
        lines += [
            f"largest batch that fits at this length: {found['batch_size']:,} rows",
            f"largest length that fits at this batch: {found['tokens']:,} tokens a row",
        ]
    if row["remedies"]:
        lines += ["", "what would help, by itself:", *(f"  {line}" for line in row["remedies"])]
    return row, "\n".join(lines), drawn


def _programs(row: Row) -> list[str]:
    """Prefill and decode, or the phases of evaluation, one line each."""
    compiled = (row["compiled"] or {}).get("programs", {})
    lines = []
    for name, size in row["predicted"]["phases"].items():
        line = f"{name}: {gib(size)} GiB predicted"
        if name in compiled:
            line += f", {gib(compiled[name]['total_bytes'])} compiled"
        lines.append(line)
    return ["", *lines]


def does_not_fit(row: Row) -> str | None:
    """The error of a plan that nothing here helps; None where it fits or something would."""
    if row["fits"] or any(line.endswith(", fits") for line in row["remedies"]):
        return None
    grade = row["compiled"] or row["predicted"]
    return (
        f"--budget_gib={row['limit_bytes'] / GIB:.4g}: no one change that this planner knows is "
        f"enough; this config needs {budget_for(grade['total_bytes'])} GiB; take that, more "
        f"devices, or several of the changes above"
    )
