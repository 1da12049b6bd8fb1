"""What a config can become on a target, as predicted rows: every layout there is, or a grid."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ml_collections import ConfigDict

from config_border import override, with_values
from config_types import plain
from experiment import read_experiment
from memory.job import Job
from memory.pipeline_search import front, promising, remats, staged_meshes, tables
from memory.plan import Row, plan
from memory.predict import predict
from memory.roofline import step_time
from memory.search import (
    describe,
    layouts,
    precision_choices,
    ranked,
    remat_choices,
    widest_tensor,
)
from parallel.targets import Target

Overrides = dict[str, Any]


def make_job(config: ConfigDict, target: Target, overrides: Overrides) -> Job:
    """The training step of a config with overrides.

    Raises:
      ValueError: a dim that the layout does not divide, or another value that is wrong.
    """
    return read_experiment(with_values(config, overrides), target.device_count).job()


def all_rows(
    config: ConfigDict,
    target: Target,
    limit_bytes: int,
    precisions: Sequence[tuple[str, str]] = (),
) -> list[Row]:
    """Every layout of the config's step on the target, predicted, the fastest first.

    The config's own mesh, ZeRO level, remat policy, offloading, micro-steps and pipeline give way.
    Of pipelines there are the promising ones: see `memory/pipeline_search.py`.

    Raises:
      ValueError: there is none; says what is wrong with the first.
    """
    host_memory = target.chip.kind != "cpu"
    space = layouts(
        target.device_count,
        config.data.batch_size,
        widest=widest_tensor(target),
        remats=remat_choices(plain(config.remat), host_memory),
        offload=(False, True) if host_memory else (),
        precisions=precisions,
        experts=config.experts.number,
    )
    rows: list[Row] = []
    error: ValueError | None = None
    for overrides in itertools.chain(space, staged(config, target, limit_bytes, precisions)):
        try:
            job = make_job(config, target, overrides)
        except ValueError as wrong:
            error = error or wrong
            continue
        name = describe(overrides)
        rows.append(plan(job, target, name=name, overrides=overrides, limit_bytes=limit_bytes))
    if rows:
        return ranked(rows)
    batch, count = config.data.batch_size, target.device_count
    if error and (batch % count == 0 or "does not divide" not in str(error)):
        raise error
    why = str(error).partition(";")[0]
    raise ValueError(
        f"config.data.batch_size = {batch} does not divide by data x fsdp = {count}; choose a "
        f"multiple of {count}, or other devices"
        + (f" (nor does tensor help: {why})" if error else "")
    )


def staged(
    config: ConfigDict, target: Target, limit_bytes: int, precisions: Sequence[tuple[str, str]]
) -> Iterator[Overrides]:
    """Layouts with stages: for each number of stages those that none beats in time and memory."""
    model = config.model
    periods = model.layers // len(model.pattern)
    own = plain(config.remat)
    meshes = staged_meshes(
        target.device_count,
        config.data.batch_size,
        widest=widest_tensor(target),
        periods=periods,
    )
    found: dict[int, list[tuple[float, float, tuple[Overrides, Job]]]] = {}
    for mesh, precision, policy in itertools.product(
        meshes, precision_choices(precisions), remats(remat_choices(own, host_memory=False))
    ):
        fixed = mesh | precision | policy
        for table in tables(mesh["config.mesh.pipe"], rows_of(config, mesh), periods):
            try:  # one is read and checked as a config, the others differ in the table alone
                job = make_job(config, target, fixed | pipeline_keys(table))
            except ValueError:
                continue
            time, size = step_time(job, target), predict(job, target.chip).total_bytes
            one = time.seconds - time.bubble_seconds, float(size), (fixed, job)
            found.setdefault(mesh["config.mesh.pipe"], []).append(one)
            break
    for stages, each in found.items():
        known: list[tuple[float, float, Overrides]] = []
        for fixed, job in promising(each, limit_bytes):
            layers: tuple[int, ...] = ()
            for table in tables(stages, rows_of(config, fixed), periods):
                assert job.pipeline is not None
                other = job.with_pipeline(replace(job.pipeline, **table))
                assert other.pipeline is not None
                if table["balance"] != "equal" and other.pipeline.layers == layers:
                    continue  # by cost as by number
                layers = other.pipeline.layers
                size = predict(other, target.chip).total_bytes
                keys = fixed | pipeline_keys(table)
                known.append((step_time(other, target).seconds, size, keys))
        yield from front(known)


def rows_of(config: ConfigDict, mesh: Overrides) -> int:
    """Sequences of a step on one device."""
    return int(config.data.batch_size // (mesh["config.mesh.data"] * mesh["config.mesh.fsdp"]))


def pipeline_keys(table: dict[str, Any]) -> Overrides:
    """The overrides of a table's keys; a schedule of one's own gives way, as the rest does."""
    return {f"config.pipeline.{key}": value for key, value in ({"orders": ""} | table).items()}


def grid_rows(
    config: ConfigDict, target: Target, limit_bytes: int, grid: Sequence[Overrides]
) -> list[Row]:
    """A row for each of the overrides, in their order; those that are wrong as failed rows.

    Raises:
      ValueError: all are; says what is wrong with the first.
    """
    rows: list[Row] = []
    for overrides in grid:
        name = describe(overrides)
        try:
            job = make_job(config, target, overrides)
        except ValueError as error:
            rows.append(failed_row(name, overrides, target, limit_bytes, str(error)))
        else:
            rows.append(plan(job, target, name=name, overrides=overrides, limit_bytes=limit_bytes))
    if all(row["status"] == "failed" for row in rows):
        raise ValueError(rows[0]["error"])
    return rows


def failed_row(
    name: str, overrides: Overrides, target: Target, limit_bytes: int, error: str
) -> Row:
    """The row of a layout that does not exist."""
    return {
        "name": name,
        "overrides": overrides,
        "target": target.name,
        "limit_bytes": limit_bytes,
        "fits": False,
        "predicted": None,
        "compiled": None,
        "measured": None,
        "status": "failed",
        "error": error,
    }


def read_grid(config: ConfigDict, lines: Sequence[str]) -> list[Overrides]:
    """All combinations of `["config.mesh.fsdp=1,2,4", ...]`, the last key changing fastest.

    Raises:
      ValueError: a line that is not KEY=VALUES, an unknown key, a value of another type.
    """
    columns: dict[str, list[Any]] = {}
    for line in lines:
        key, equals, values = line.lstrip("-").partition("=")
        if not equals or not key.startswith("config."):
            raise ValueError(f"--grid={line}: give --grid=config.SECTION.KEY=VALUE,VALUE,...")
        if key in columns:
            raise ValueError(f"--grid={line}: {key} is given twice; put all its values in one")
        columns[key] = []
        for value in values.split(","):
            given = plain(override(config, [f"--{key}={value.strip()}"]))
            for name in key.split(".")[1:]:
                given = given[name]
            columns[key].append(given)
    return [
        dict(zip(columns, values, strict=True)) for values in itertools.product(*columns.values())
    ]
