"""Which pipelines a search looks at: the stages, and for each the schedules worth a prediction.

Stages times schedules times micro-batches times everything else would be too many to predict. So
what hardly ever pays is left out: gpipe (1f1b waits as long and keeps less), ZeRO level 1 (a
stage's sums of gradients are float32), an undivided residual stream beside `tensor`, micro-batches
of more than two rows, and forms that another beats (`pays`). All schedules, with layers divided
equally and by cost, are looked at only for the `promising` meshes and policies, which one schedule
tells. And of each number of stages those layouts are kept than which none is both faster and
smaller: `front`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any, TypeVar

from memory.search import Overrides, powers_of_two
from parallel.mesh import AXES
from parallel.pipeline import BALANCES
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
    """Schedules with form, micro-batches and balance, as keys of `config.pipeline`; of two that
    differ in balance alone, the equal one comes first.

    Args:
      rows: of a step on one device.
      periods: of layers in the model.
    """
    for schedule, forms in FORMS.items():
        chunks = 2 if schedule in ("interleaved", "zb_v") else 1
        if schedule == "gpipe" or stages * chunks > periods:
            continue
        sizes = [size for size in powers_of_two(rows) if size <= ROWS and rows // size >= stages]
        for form, size in product(forms, sizes):
            number = rows // size
            uneven = schedule == "interleaved" and number % stages
            if uneven or not pays(schedule, form, stages):
                continue
            for balance in BALANCES:
                yield {
                    "schedule": schedule,
                    "form": form,
                    "microbatches": number,
                    "chunks": 0,
                    "balance": balance,
                    "layers": (),
                }


def pays(schedule: str, form: str, stages: int) -> bool:
    """Whether a form can be faster or smaller than the other forms of its schedule."""
    if (schedule, form) == ("interleaved", "single"):
        return False  # holds as many residuals as wide, and sends twice as often
    if (schedule, form) == ("zb_h1", "lean"):
        return stages > 2  # else as many residuals as wide, one more that waits for W, more ticks
    if (schedule, form) == ("1f1b", "lean"):
        # Holds what single does. A micro-batch takes 2 - 1 / stages of its ticks, each an F and a
        # backward pass, where it takes two of single, each a backward pass at most. So it is faster
        # from 2 stages - 1 forwards a backward pass on, of which there are four at most: two for
        # gradients, one computed again, and attention's products twice.
        return stages < 4
    return True


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
