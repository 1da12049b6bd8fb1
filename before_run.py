"""What train.py does before it allocates: the plan, the layout where it may choose, the checkpoint
that it starts from.

`config.layout = "auto"` takes the fastest layout that is predicted to fit the devices that are
here, and gives the next one when it runs out of memory all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from config_border import is_run, with_values
from experiment import Experiment, read_experiment
from hf.files import open_folder
from hf.importing import find_params, read_params
from layouts import all_rows
from memory.measure import OutOfMemory
from memory.plan import GIB, Row, gib, plan, remedies
from memory.plan_text import verdict
from memory.search import best_of, fallbacks, nothing_fits
from parallel.targets import Target, local_target
from run_adapters import AdapterCheckpoints, checkpoints_of
from teacher import check_same_teacher
from training.checkpoint import Checkpoints
from training.naming import TRAINING_ONLY
from training.state import Model, Tree, drawn_params
from training.trunk import trunk_params


def with_plan(
    config: ConfigDict, train: Callable[[ConfigDict], None], say: Callable[[str], None]
) -> None:
    """Trains with the config, or with each layout that is chosen for it until one has room."""
    plans = planned(config, say)
    config = next(plans)
    while True:
        try:
            return train(config)
        except OutOfMemory:
            following = next(plans, None)
            if following is None:
                raise
            config = following


def planned(config: ConfigDict, say: Callable[[str], None]) -> Iterator[ConfigDict]:
    """The configs to train with: the first, and after each that ran out of memory the next.

    Args:
      say: prints a line for a person.

    Raises:
      ValueError: the config cannot fit (`config.memory.check`), or no layout does.
    """
    try:
        target = local_target()
    except ValueError as error:  # a device that nobody has described
        if config.layout == "auto":
            raise
        say(f"plan: none, {error}")
        yield config
        return
    settings = read_experiment(config, jax.device_count()).memory  # refuses what is wrong in itself
    limit = int(settings.budget_gib * GIB) or target.chip.memory
    if config.layout == "auto":
        yield from _chosen(config, target, limit, say)
    else:
        _check(config, target, limit, settings.check, say)
        yield config


def _chosen(
    config: ConfigDict, target: Target, limit: int, say: Callable[[str], None]
) -> Iterator[ConfigDict]:
    rows = all_rows(config, target, limit)
    best = best_of(rows)
    if best is None:
        words = str(nothing_fits(rows, limit)).removeprefix("--budget_gib")
        raise ValueError(f"config.memory.budget_gib{words}")
    say(f"layout: {best['name']}, the fastest of {len(rows)} that is predicted to fit")
    for row in (best, *fallbacks(rows, best)):
        if row is not best:
            say(f"out of memory: trying the next layout, {row['name']}")
        say(f"plan: {summary(row)}")
        yield with_values(config, row["overrides"])


def _check(
    config: ConfigDict, target: Target, limit: int, check: str, say: Callable[[str], None]
) -> None:
    experiment = read_experiment(config, target.device_count)
    job = experiment.job()
    row = plan(job, target, name=experiment.describe_layout(), overrides={}, limit_bytes=limit)
    say(f"plan: {summary(row)}")
    if row["fits"] or check == "off":
        return

    def change(overrides: dict[str, object]) -> object:
        return read_experiment(with_values(config, overrides), target.device_count).job()

    helps = remedies(job, target, limit, change)  # type: ignore[arg-type]
    advice = f"; {helps[0]}" if helps else ""
    line = f"{verdict(row)}{advice}; plan.py says more"
    if check == "refuse":
        raise ValueError(f"{line}; config.memory.check=warn runs it all the same")
    say(f"warning: {line}")


def summary(row: Row) -> str:
    """One line: what is needed, of what, and the largest components."""
    grade = row["predicted"]
    largest = sorted(grade["components"].items(), key=lambda item: -item[1])[:4]
    named = ", ".join(f"{name} {gib(size)}" for name, size in largest)
    total, limit = gib(grade["total_bytes"]), gib(row["limit_bytes"])
    return f"{total} of {limit} GiB per device predicted ({named})"


def beginning(
    checkpoints: Checkpoints,
    workdir: Path,
    experiment: Experiment,
    model: Model,
    mesh: jax.sharding.Mesh,
) -> tuple[Checkpoints, Callable[[], Tree | None]]:
    """The checkpoints of a run, and what reads the parameters that a new one begins from.

    Raises:
      ValueError: of `initial_params`.
    """
    kept = experiment.checkpoint
    own = checkpoints_of(checkpoints, workdir, kept, experiment, model, mesh)
    if isinstance(own, AdapterCheckpoints):
        return own, own.begun
    return own, initial_params(experiment, model, mesh)


def initial_params(
    experiment: Experiment, model: Model, mesh: jax.sharding.Mesh
) -> Callable[[], Tree | None]:
    """Reads the parameters of `config.init_from`, once called; None without one.

    Raises:
      ValueError: at once, if the folder is not of this model, or the run not of its trunk.
    """
    if not experiment.init_from:
        return lambda: None
    if is_run(experiment.init_from):
        return trunk_params(
            Checkpoints(Path(experiment.init_from) / "checkpoints"),
            f"config.init_from = '{experiment.init_from}'",
            model,
            experiment.precision,
            experiment.seed,
            mesh,
            new=(*experiment.init_new, f"{TRAINING_ONLY}/*"),
            drop=(*experiment.init_drop, f"{TRAINING_ONLY}/*"),
        )
    folder = open_folder(Path(experiment.init_from), "config.init_from")
    alone = replace(experiment, teacher=None).build_model()  # the checkpoint is of a model alone
    found = find_params(folder, experiment.model, alone, experiment.precision)

    def read() -> Tree:
        params = read_params(found, alone, experiment.precision, mesh)
        rest = lambda drawn: {n: tree for n, tree in drawn.items() if n not in params}
        drawn = (
            {}
            if model.axes.keys() == alone.axes.keys()
            else drawn_params(model, experiment.precision, experiment.seed, rest)
        )
        return params | drawn

    return read


def check_trainable(checkpoints: Checkpoints, workdir: Path) -> None:
    """Refuses to continue a run that `python -m compress` wrote.

    Raises:
      ValueError: its newest checkpoint has parameters alone.
    """
    step = checkpoints.latest()
    if step is not None and checkpoints.metadata(step).keys() & {"compressed", "merged"}:
        raise ValueError(
            f"--workdir={workdir}: python -m compress wrote it, without an optimizer's state; "
            f"train it in a new --workdir, with --config=FILE and --config.init_from={workdir}"
        )


def check_same_inputs(
    saved: Mapping[str, Any], now: Mapping[str, str], config: ConfigDict, workdir: Path
) -> None:
    """Refuses to continue on other data, or with another teacher, than the checkpoint has seen.

    Args:
      saved: the checkpoint's metadata, with the fingerprints of both; an older one has no teacher.
      now: those of `data` and `teacher` here.
    """
    if saved["data"] != now["data"]:
        raise ValueError(
            f"config.data: the files have changed since --workdir={workdir} was trained "
            f"(fingerprint {saved['data'][:12]}, now {now['data'][:12]}); give the same files or "
            f"another --workdir"
        )
    check_same_teacher(saved.get("teacher", ""), now["teacher"], config.distill.teacher, workdir)
