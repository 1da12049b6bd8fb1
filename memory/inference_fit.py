"""Generation that fits: the largest batch and length, and what helps where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from memory.inference import predict_inference
from memory.inference_job import InferenceJob
from memory.plan import gib, shown
from parallel.chips import Chip

MOST_ROWS = 2**16  # of one part of the batch: more is no batch


@dataclass(frozen=True)
class Largest:
    """What fits a limit, by prediction.

    Attributes:
      rows: of the batch, at the length that is given; 0: none.
      slots: tokens of a row, those of an image and of what is generated too, at the batch that is
        given; 0: none.
    """

    rows: int
    slots: int

    def __str__(self) -> str:
        return (
            f"the largest that fits: config.generate.batch_size={self.rows} at this length, "
            f"{self.slots:,} tokens a row at this batch"
        )


def largest(job: InferenceJob, chip: Chip, limit: int) -> Largest:
    """The largest batch and the longest rows within `limit` bytes per device."""

    def fits(**size: int) -> bool:
        return predict_inference(job.resized(**size), chip).total_bytes <= limit

    parts = job.rules.parts("batch")
    rows = parts * _most(1, MOST_ROWS, lambda n: fits(rows=parts * n))
    beside = job.model.family == "encoder_decoder"  # whose prompt is one token
    least = 2 if beside else job.model.image_tokens + job.new_tokens + 1
    return Largest(rows, _most(least, job.model.max_length, lambda n: fits(slots=n)))


def _most(least: int, most: int, fits: Callable[[int], bool]) -> int:
    """The largest number that fits, of those where all smaller ones do; 0 where none does."""
    if least > most or not fits(least):
        return 0
    if fits(most):
        return most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


@dataclass(frozen=True)
class Change:
    """Config keys that save memory.

    Attributes:
      saves: bytes per device, predicted.
      fits: whether it is enough by itself.
    """

    overrides: dict[str, Any]
    saves: int
    fits: bool

    def __str__(self) -> str:
        flags = " ".join(f"--{key}={shown(value)}" for key, value in self.overrides.items())
        end = "fits" if self.fits else "not enough alone"
        return f"{flags}: saves {gib(self.saves)} GiB, {end}"


def candidates(job: InferenceJob, found: Largest) -> Iterable[dict[str, Any]]:
    """Changes of one idea each, those that change no text first."""
    data, fsdp, tensor = (job.sizes[axis] for axis in ("data", "fsdp", "tensor"))
    shape = job.shape
    if job.rules.zero < 3 and fsdp > 1:
        yield {"config.parallel.zero": 3}
    if data > 1:
        yield {"config.mesh.data": 1, "config.mesh.fsdp": fsdp * data, "config.parallel.zero": 3}
    for axis, size in (("fsdp", fsdp), ("data", data)):
        parts = 2
        while size % parts == 0:
            yield {f"config.mesh.{axis}": size // parts, "config.mesh.tensor": tensor * parts}
            parts *= 2
    if job.compute == "float32":
        yield {"config.precision.compute": "bfloat16"}
    if not shape.int8:
        yield {"config.generate.cache_dtype": "int8"}
    if not shape.block:  # rows wait for blocks where not all are as long as they may be
        size = 16
        row = -(-shape.slots // size)
        for share in (2, 4):
            blocks = shape.rows * row // share
            yield {"config.generate.cache": "paged", "config.generate.blocks": blocks}
    if 0 < found.rows < shape.rows:
        yield {"config.generate.batch_size": found.rows}
    new = job.new_tokens - (shape.slots - found.slots)
    if found.slots and new >= 1:
        yield {"config.generate.max_new_tokens": new}
    prompt = job.prompt - (shape.slots - found.slots)
    if found.slots and prompt >= 1:
        yield {"config.generate.prompt_length": prompt}


def changes(
    job: InferenceJob, chip: Chip, limit: int, change: Callable[[dict[str, Any]], InferenceJob]
) -> list[Change]:
    """What helps, what is enough by itself first.

    Args:
      change: overrides -> the job with them; raises ValueError for what does not exist.
    """
    before = predict_inference(job, chip).total_bytes
    found = []
    for overrides in candidates(job, largest(job, chip, limit)):
        try:
            after = predict_inference(change(overrides), chip).total_bytes
        except ValueError:
            continue
        if after < before:
            found.append(Change(overrides, before - after, after <= limit))
    return sorted(found, key=lambda c: (not c.fits, 0 if c.fits else -c.saves))
