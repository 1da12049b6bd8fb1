"""One config on one target: the grades of truth side by side, whether it fits, and what would help.

A row is plain data, as `sweep.jsonl` and `plan.py --json` hold it:

    name, overrides, target, limit_bytes, fits, status, error
    predicted   total_bytes, host_bytes, components, seconds, mfu, ..._seconds
    compiled    the same counted from the compiled program, or None
    measured    total_bytes, seconds, tokens_per_second of a run, or None
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from memory.job import Job
from memory.predict import Prediction, predict
from memory.roofline import step_time
from memory.step_time import StepTime
from parallel.mesh import PIPE
from parallel.pipeline import PipelineConfig
from parallel.schedule_kinds import FORMS
from parallel.targets import Target

Row = dict[str, Any]
GIB = 2**30


@dataclass(frozen=True)
class MemoryConfig:
    """What is done about a run that does not fit (`config.memory`).

    Attributes:
      check: refuse, warn or off.
      budget_gib: GiB per device that may be used; 0: all that the device has.
    """

    check: str = "refuse"
    budget_gib: float = 0.0

    def __post_init__(self) -> None:
        if self.check not in ("refuse", "warn", "off"):
            raise ValueError(
                f"config.memory.check = {self.check!r}: choose one of refuse, warn, off"
            )
        if self.budget_gib < 0:
            raise ValueError(
                f"config.memory.budget_gib = {self.budget_gib}: GiB per device, or 0 for all"
            )


def limit_for(target: Target, budget_gib: float | None) -> int:
    """Bytes per device that may be used: what `--budget_gib` says, or all that the device has.

    Raises:
      ValueError: a budget that is no size.
    """
    if budget_gib is None:
        return target.chip.memory
    if not 0 < budget_gib < math.inf:
        raise ValueError(f"--budget_gib={budget_gib}: GiB per device, above 0")
    return round(budget_gib * GIB)


def predicted(prediction: Prediction, time: StepTime) -> dict[str, Any]:
    """A prediction as plain data."""
    return {
        "total_bytes": prediction.total_bytes,
        "host_bytes": prediction.host_bytes,
        "components": prediction.components,
        "phases": prediction.phases,
    } | time.grade()


def plan(
    job: Job, target: Target, *, name: str, overrides: dict[str, Any], limit_bytes: int
) -> Row:
    """The row of one layout, predicted."""
    grade = predicted(predict(job, target.chip), step_time(job, target))
    return {
        "name": name,
        "overrides": overrides,
        "target": target.name,
        "limit_bytes": limit_bytes,
        "fits": grade["total_bytes"] <= limit_bytes,
        "predicted": grade,
        "compiled": None,
        "measured": None,
        "status": "ok" if grade["total_bytes"] <= limit_bytes else "does not fit",
        "error": None,
    }


@dataclass(frozen=True)
class Remedy:
    """A change that saves memory.

    Attributes:
      overrides: config key -> value.
      saves: bytes per device, predicted.
      time: step time over what it was.
      fits: whether it is enough by itself.
    """

    overrides: dict[str, Any]
    saves: int
    time: float
    fits: bool

    def flags(self) -> list[str]:
        """The change as a command line takes it."""
        return [f"--{key}={shown(value)}" for key, value in self.overrides.items()]

    def __str__(self) -> str:
        change = " ".join(self.flags())
        end = "fits" if self.fits else "not enough alone"
        return f"{change}: saves {gib(self.saves)} GiB, step time x {self.time:.2f}, {end}"


def candidates(job: Job, platform: str) -> Iterable[dict[str, Any]]:
    """Changes of one idea each that could make `job` smaller."""
    fsdp, data, tensor = (job.sizes[axis] for axis in ("fsdp", "data", "tensor"))
    own = job.remat.policy == "custom"  # whose lists the presets do not take
    lists: dict[str, Any] = {"config.remat.save": (), "config.remat.offload": ()} if own else {}
    for policy in ("attention", "dots", "full"):
        if job.remat.policy != policy:
            yield {"config.remat.policy": policy} | lists
    if job.parallel.zero < 3 and fsdp > 1:
        yield {"config.parallel.zero": 3}
    if data > 1:
        yield {
            "config.mesh.data": 1,
            "config.mesh.fsdp": fsdp * data,
            "config.parallel.zero": 3,
        }
    if tensor > 1 and not job.parallel.sequence:
        yield {"config.parallel.sequence": True}
    if fsdp > 1:
        yield {
            "config.mesh.tensor": tensor * 2,
            "config.mesh.fsdp": fsdp // 2,
            "config.parallel.sequence": True,
        }
    staged = job.pipeline is not None
    parts = "config.pipeline.microbatches" if staged else "config.train.grad_accumulation"
    micro = job.micro_steps
    while job.rows * job.micro_steps > micro:
        micro *= 2
        yield {parts: micro}
    if job.pipeline is not None:
        yield from _other_stages(job, job.pipeline)
    if job.precision.compute == "float32":
        yield {"config.precision.compute": "bfloat16"}
    if platform != "cpu" and not staged and not job.optimizer.offload:
        yield {"config.optimizer.offload": True}
    if job.model.attention == "xla":
        yield {"config.model.attention": "blocked"}
    if job.loss.chunk > 256:
        yield {"config.loss.chunk": 256}


def _other_stages(job: Job, pipeline: PipelineConfig) -> Iterable[dict[str, Any]]:
    """Schedules and forms with other slots, and twice as many stages."""
    for name, forms in FORMS.items():
        for form in forms:
            if (name, form) != (pipeline.schedule, pipeline.form or FORMS[name][0]):
                yield {
                    "config.pipeline.schedule": name,
                    "config.pipeline.form": form,
                    "config.pipeline.chunks": 0,
                    "config.pipeline.orders": "",
                }
    for axis in ("data", "fsdp", "tensor"):
        if job.sizes[axis] % 2 == 0:
            yield {
                "config.mesh.pipe": 2 * job.sizes[PIPE],
                f"config.mesh.{axis}": job.sizes[axis] // 2,
            }


def remedies(
    job: Job,
    target: Target,
    limit_bytes: int,
    change: Callable[[dict[str, Any]], Job],
) -> list[Remedy]:
    """What to change, cheapest in time first among what fits, then by bytes saved.

    Args:
      change: overrides -> the job with them; raises ValueError for what does not exist.
    """
    before, seconds = predict(job, target.chip).total_bytes, step_time(job, target).seconds
    found = []
    for overrides in candidates(job, target.chip.kind):
        try:
            other = change(overrides)
        except ValueError:
            continue
        after = predict(other, target.chip).total_bytes
        if after < before:
            time = step_time(other, target).seconds / seconds
            found.append(Remedy(overrides, before - after, time, after <= limit_bytes))
    return sorted(found, key=lambda r: (not r.fits, r.time if r.fits else -r.saves))


def together(
    job: Job,
    target: Target,
    limit_bytes: int,
    change: Callable[[dict[str, Any]], Job],
) -> Remedy:
    """Remedies added one by one: the cheapest in time that is enough, or else the one that saves
    most, until it fits or nothing saves more.
    """
    before, seconds = predict(job, target.chip).total_bytes, step_time(job, target).seconds
    overrides: dict[str, Any] = {}
    now = job
    while predict(now, target.chip).total_bytes > limit_bytes:
        sofar = dict(overrides)
        steps = remedies(now, target, limit_bytes, lambda more, sofar=sofar: change(sofar | more))  # type: ignore[misc]
        if not steps:
            break
        best = min(steps, key=lambda r: (not r.fits, r.time if r.fits else -r.saves))
        overrides = overrides | best.overrides
        now = change(overrides)
    after = predict(now, target.chip).total_bytes
    time = step_time(now, target).seconds / seconds
    return Remedy(overrides, before - after, time, after <= limit_bytes)


def gib(size: float) -> str:
    """Bytes in GiB, with two decimals, or two digits of what is small."""
    return f"{size / GIB:.2f}" if size >= GIB / 10 else f"{size / GIB:.2g}"


def budget_for(size: float) -> float:
    """The budget in GiB that has room for `size` bytes: rounded up, so that it can be given."""
    parts = 100 if size > GIB else 100_000
    return math.ceil(size / GIB * parts) / parts


def shown(value: Any) -> str:
    """A value as a command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
