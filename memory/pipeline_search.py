"""Which pipelines a search looks at: the stages, and for each the schedules worth a prediction.

Stages times schedules times micro-batches times everything else would be too many to predict. So
what hardly ever pays is left out: gpipe (1f1b waits as long and keeps less), ZeRO level 1 (a
stage's sums of gradients are float32), an undivided residual stream beside `tensor`, micro-batches
of more than two rows. All schedules are looked at only for the `promising` meshes and policies,
which one schedule tells. And of each number of stages those layouts are kept than which none is
both faster and smaller: `front`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from memory.search import Overrides, powers_of_two
from parallel.mesh import AXES
from parallel.schedule_kinds import FORMS

ROWS = 2  # of a micro-batch on a device, at most
STAGES = 16  # at most; more wait longer than their memory is worth, and their tables take seconds
# Meshes with a remat policy, of a number of stages, that are looked at with all schedules: so many
# of the fastest without any bubble, and of the smallest.
FASTEST, SMALLEST = 12, 4
NEAR = 1.3  # over the limit by one schedule may be within it by another with fewer slots
Item = TypeVar("Item")


def stage_counts(devices: int, periods: int) -> list[int]:
    """Sizes of the pipe axis: each stage has a period of layers at least."""
    return [p for p in range(2, min(devices, periods, STAGES) + 1) if devices % p == 0]


def staged_meshes(
    devices: int, batch_size: int, *, widest: int, periods: int
) -> Iterator[Overrides]:
    """Meshes with stages, their ZeRO level and sequence parallelism."""
    for stages in stage_counts(devices, periods):
        for tensor in powers_of_two(devices // stages):
            if tensor > widest:
                continue
            copies = devices // stages // tensor
            # A pipeline runs as many micro-batches as it has stages, or more.
            if batch_size % copies or batch_size // copies < stages:
                continue
            for fsdp in sorted({1, min(copies, 8), copies}):
                if copies % fsdp:
                    continue
                sizes = {"pipe": stages, "data": copies // fsdp, "fsdp": fsdp, "tensor": tensor}
                mesh = {f"config.mesh.{axis}": sizes.get(axis, 1) for axis in AXES}
                for zero in (2, 3) if fsdp > 1 else (3,):
                    yield mesh | {
                        "config.parallel.zero": zero,
                        "config.parallel.sequence": tensor > 1,
                        "config.train.grad_accumulation": 1,
                        "config.optimizer.offload": False,
                    }


def tables(stages: int, rows: int, periods: int) -> Iterator[dict[str, Any]]:
    """Schedules with form and micro-batches, as keys of `config.pipeline`.

    Args:
      rows: of a step on one device.
      periods: of layers in the model.
    """
    for schedule, forms in FORMS.items():
        chunks = 2 if schedule in ("interleaved", "zb_v") else 1
        if schedule == "gpipe" or stages * chunks > periods:
            continue
        for form in forms:
            for size in powers_of_two(rows):
                number = rows // size
                wanted = stages if schedule == "interleaved" else 1
                if size <= ROWS and number >= stages and number % wanted == 0:
                    yield {
                        "schedule": schedule,
                        "form": form,
                        "microbatches": number,
                        "chunks": 0,
                        "layers": (),
                    }


def promising(items: Sequence[tuple[float, float, Item]], limit: int) -> list[Item]:
    """Of (seconds without bubble, bytes, item), some of the smallest, and of the fastest that could
    be within `limit` bytes by some schedule.
    """
    places = range(len(items))
    near = [i for i in places if items[i][1] <= limit * NEAR]
    chosen = sorted(near, key=lambda i: items[i][0])[:FASTEST]
    chosen += sorted(places, key=lambda i: items[i][1])[:SMALLEST]
    return [items[i][2] for i in dict.fromkeys(chosen)]


def front(items: Iterable[tuple[float, float, Item]]) -> list[Item]:
    """Of (seconds, bytes, item), those than which none is faster and not larger."""
    kept: list[Item] = []
    least = float("inf")
    for _, size, item in sorted(items, key=lambda one: one[:2]):
        if size < least:
            least = size
            kept.append(item)
    return kept


def remats(choices: Sequence[Overrides]) -> list[Overrides]:
    """Those of `memory.search.remat_choices` that keep all on the device, as stages do."""
    return [choice for choice in choices if not choice.get("config.remat.offload")]
