"""Which layouts there are, and the fastest that fits: predicted all, compiled as few as will do.

Layouts are config overrides, so that whoever searches says how a layout becomes a job, a row
(memory/plan.py) or a compiled row; nothing here knows configs or compilers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from memory.plan import GIB, Row, budget_for
from parallel.mesh import AXES, NOT_BUILT_YET, PIPE
from parallel.remat import DOTS, PRESETS
from parallel.rules import EXPERT
from parallel.targets import Target

Overrides = dict[str, Any]

# A layout is given up uncompiled where its prediction is over the budget by more than this share:
# 117 of the 125 cells of docs/memory-accuracy/ are not predicted larger by as much.
MEMORY_ERROR = 0.10
# Layouts whose predicted times are closer than this share are ties: compiled programs decide.
TIES = 0.02


def layouts(
    devices: int,
    batch_size: int,
    *,
    widest: int,
    remats: Sequence[Overrides],
    offload: Sequence[bool] = (),
    precisions: Sequence[tuple[str, str]] = (),
    experts: int = 0,
) -> Iterator[Overrides]:
    """All layouts of a step, each program once, always in the same order.

    What is the same program is left out: ZeRO levels without an `fsdp` axis, level 0 with one
    (that is a `data` axis), sequence parallelism without `tensor`. Dims that do not divide are for
    the caller to find out.

    Args:
      devices: the product of the mesh axes.
      batch_size: sequences of a step, divided over data, fsdp and micro-steps.
      widest: the largest `tensor` axis: beyond the fast links it never pays.
      remats: overrides of `config.remat`, see `remat_choices`.
      offload: values of `config.optimizer.offload` to try; none leaves the config's own.
      precisions: (params, compute) to try; none leaves the config's own.
      experts: of the model, which the expert axis divides; 0 for a dense one.
    """
    for sizes in meshes(devices, experts):
        parts = sizes["data"] * sizes["fsdp"] * sizes[EXPERT]
        if sizes["tensor"] > widest or batch_size % parts:
            continue
        rows = batch_size // parts
        for zero in (1, 2, 3) if sizes["fsdp"] > 1 else (3,):
            for sequence in (False, True) if sizes["tensor"] > 1 else (False,):
                fixed = {f"config.mesh.{axis}": size for axis, size in sizes.items()}
                fixed |= {"config.parallel.zero": zero, "config.parallel.sequence": sequence}
                fixed |= {"config.mesh.pipe": 1}
                for remat in remats:
                    for micro in powers_of_two(rows):
                        layout = fixed | remat | {"config.train.grad_accumulation": micro}
                        for more in _products(offload, precisions):
                            yield layout | more


def meshes(devices: int, experts: int = 0) -> Iterator[dict[str, int]]:
    """All ways to write `devices` as a product over the mesh axes that can be planned for; the
    expert axis divides `experts`, and is 1 where there are none.
    """
    axes = [axis for axis in AXES if axis not in (*NOT_BUILT_YET, PIPE)]

    def divide(left: int, names: list[str]) -> Iterator[dict[str, int]]:
        if len(names) == 1:
            yield {names[0]: left}
            return
        for size in range(1, left + 1):
            if left % size == 0:
                yield from ({names[0]: size} | rest for rest in divide(left // size, names[1:]))

    found = divide(devices, axes)
    return (s for s in found if (experts % s[EXPERT] == 0 if experts else s[EXPERT] == 1))


def powers_of_two(number: int) -> list[int]:
    """Those that divide `number`."""
    return [2**k for k in range(number.bit_length()) if number % 2**k == 0]


def remat_choices(own: Overrides, host_memory: bool) -> list[Overrides]:
    """The presets; the config's own policy where it is a list of names; and, where the platform
    has a host memory, what products leave behind kept there.

    Args:
      own: `config.remat`'s policy, save and offload.
      host_memory: whether offloading has an effect.
    """
    found: list[Overrides] = [{"policy": policy} for policy in PRESETS]
    if host_memory:
        found.append({"policy": "custom", "offload": DOTS})
    if own["policy"] == "custom":
        lists: Overrides = {"save": (), "offload": ()}
        found = [own, *(lists | choice for choice in found)]
        found = [choice for i, choice in enumerate(found) if choice not in found[:i]]
    return [{f"config.remat.{key}": value for key, value in one.items()} for one in found]


def widest_tensor(target: Target) -> int:
    """Devices that fast links join: a host of GPUs, a side of a TPU's torus."""
    tpu = target.chip.kind == "tpu"
    return max(target.devices_per_host, *target.shape) if tpu else target.devices_per_host


def describe(overrides: Overrides) -> str:
    """A layout's name: "data 2, fsdp 4, zero 3, remat full, micro-steps 8"."""
    value = {key.removeprefix("config."): value for key, value in overrides.items()}
    words = [f"{axis} {n}" for axis in AXES if (n := value.pop(f"mesh.{axis}", 1)) != 1]
    zero, sequence = value.pop("parallel.zero", None), value.pop("parallel.sequence", False)
    if zero is not None and (overrides.get("config.mesh.fsdp", 0) != 1):
        words.append(f"zero {zero}")
    if sequence:
        words.append("sequence")
    schedule, form = value.pop("pipeline.schedule", None), value.pop("pipeline.form", "")
    if schedule is not None:
        chunks = value.pop("pipeline.chunks", 0)
        each = [schedule, form, f"{chunks} chunks" if chunks else ""]
        words.append(" ".join(filter(None, each)))
    if (parts := value.pop("pipeline.microbatches", None)) is not None:
        words.append(f"micro-batches {parts}")
    if (balance := value.pop("pipeline.balance", "equal")) != "equal":
        words.append(f"balance {balance}")
    if not value.get("pipeline.layers", True):
        value.pop("pipeline.layers")
    policy = value.pop("remat.policy", None)
    save, offloaded = value.pop("remat.save", ()), value.pop("remat.offload", ())
    if policy is not None:
        kept = [f"save {' '.join(save)}"] if save else []
        names = "dots" if tuple(offloaded) == DOTS else " ".join(offloaded)
        kept += [f"offload {names}"] if offloaded else []
        words.append(f"remat {' '.join(kept) or policy}")
    if (micro := value.pop("train.grad_accumulation", 1)) != 1:
        words.append(f"micro-steps {micro}")
    if value.pop("optimizer.offload", False):
        words.append("optimizer on the host")
    params, compute = value.pop("precision.params", ""), value.pop("precision.compute", "")
    if params or compute:
        words.append("/".join(dict.fromkeys(filter(None, (params, compute)))))
    words += [f"{key} {item}" for key, item in value.items()]
    return ", ".join(words) or "one device"


def seconds(row: Row) -> float:
    """A row's step time: measured, else compiled where the program was counted, else predicted."""
    for grade in ("measured", "compiled"):
        if row[grade] and "seconds" in row[grade]:
            return float(row[grade]["seconds"])
    return float(row["predicted"]["seconds"])


def total_bytes(row: Row) -> int:
    """A row's bytes per device: compiled where there is one, else predicted."""
    return int((row["compiled"] or row["predicted"])["total_bytes"])


def ranked(rows: Iterable[Row]) -> list[Row]:
    """By predicted time; of equally fast ones the smaller first."""
    return sorted(
        rows, key=lambda row: (row["predicted"]["seconds"], row["predicted"]["total_bytes"])
    )


NOT_KEPT = ("status", "error", "buffers", "timeline")  # of a compiled answer, in a row


def with_compiled(row: Row, answer: dict[str, Any]) -> Row:
    """The row with what `compile_for` answered; whether it fits is the compiler's word now."""
    if answer["status"] == "failed":
        return row | {"fits": False, "status": "failed", "error": answer["error"]}
    grade = {name: value for name, value in answer.items() if name not in NOT_KEPT}
    fits = answer["status"] == "ok" and grade["total_bytes"] <= row["limit_bytes"]
    status = "ok" if fits else "does not fit"
    return row | {"compiled": grade, "fits": fits, "status": status, "error": answer.get("error")}


def search(
    rows: Sequence[Row],
    compile_rows: Callable[[list[Row]], list[Row]],
    *,
    budget: int,
    most: int,
    width: int = 1,
    memory_error: float = MEMORY_ERROR,
    ties: float = TIES,
) -> list[Row]:
    """The fastest layout that fits the budget, first, and all others that were compiled.

    In the order of predicted time, rows are compiled until one fits, and then those that are as
    fast by prediction: of ties, the compiled program's roofline decides. So that something fits in
    the end, the last compilation is spent on a row that is predicted to fit well, if none has yet.

    Args:
      rows: predicted.
      compile_rows: compiles some, at once if it can: see `with_compiled`.
      budget: bytes per device.
      most: compilations.
      width: rows to compile at once.
      memory_error: rows predicted to be over the budget by more than this share are left out.
      ties: predicted times closer than this share are equal.

    Raises:
      ValueError: nothing fits; says the least that would.
    """
    assert most >= 1
    assert width >= 1
    waiting = ranked(row for row in rows if total_bytes(row) <= budget * (1 + memory_error))
    tried: list[Row] = []
    while waiting and len(tried) < most:
        best = best_of(tried)
        batch = [row for row in waiting[:width] if best is None or _ties(row, tried, ties)]
        batch = batch[: most - len(tried)]
        if not batch:
            break
        if best is None and len(tried) + len(batch) == most:
            batch[-1] = _safest(waiting[len(batch) - 1 :], budget / (1 + memory_error))
        tried += compile_rows(batch)
        waiting = [row for row in waiting if all(row is not one for one in batch)]
    if best_of(tried) is None:
        raise nothing_fits(tried or list(rows), budget, left=len(waiting))
    return sorted(tried, key=lambda row: (not row["fits"], seconds(row)))


def best_of(rows: Iterable[Row]) -> Row | None:
    """The fastest row that fits; None if none does."""
    return min((row for row in rows if row["fits"]), key=seconds, default=None)


def nothing_fits(rows: Sequence[Row], budget: int, left: int = 0) -> ValueError:
    """The error that says the least that would; `left` layouts were never compiled."""
    sized = [row for row in rows if row["status"] != "failed"]
    if not sized:
        return ValueError(f"no layout could be compiled; the first says: {rows[0]['error']}")
    least = min(sized, key=total_bytes)
    gib = budget_for(total_bytes(least))
    return ValueError(
        f"--budget_gib={budget / GIB:.4g}: nothing fits"
        + (f" of the {len(rows)} layouts compiled, {left} are left (raise --top)" if left else "")
        + f"; the least is {gib} GiB with {least['name']}"
    )


def fallbacks(rows: Iterable[Row], failed: Row) -> list[Row]:
    """The next plans, in order, for a layout that ran out of memory where it was to fit.

    Each is the fastest of those that need less by the prediction's error than the one before.
    """
    plans: list[Row] = []
    limit = total_bytes(failed)
    for row in ranked(rows):
        if total_bytes(row) * (1 + MEMORY_ERROR) < limit:
            plans.append(row)
            limit = total_bytes(row)
    return plans


def why(row: Row) -> str:
    """What a step's time goes to: "MFU 45%: compute 70%, memory traffic 12%, waiting for ..."."""
    grade = row["predicted"]
    parts = {
        "compute": grade["compute_seconds"],
        "memory traffic": grade["memory_seconds"],
        **{f"waiting for {axis}": time for axis, time in grade["exposed_seconds"].items()},
        "waiting for the host": grade["host_seconds"],
        "pipeline bubble": grade["bubble_seconds"],
    }
    shares = [f"{part} {time / grade['seconds']:.0%}" for part, time in parts.items() if time]
    return f"MFU {grade['mfu']:.0%}: {', '.join(shares)}"


def _ties(row: Row, tried: list[Row], ties: float) -> bool:
    first = min(float(one["predicted"]["seconds"]) for one in tried if one["fits"])
    return float(row["predicted"]["seconds"]) <= first * (1 + ties)


def _safest(rows: Sequence[Row], limit: float) -> Row:
    """The first that is well within the limit, or else the smallest."""
    within = (row for row in rows if total_bytes(row) <= limit)
    return next(within, None) or min(rows, key=total_bytes)


def _products(
    offload: Sequence[bool], precisions: Sequence[tuple[str, str]]
) -> Iterator[Overrides]:
    for on_host in offload or (None,):
        for precision in precision_choices(precisions):
            yield ({} if on_host is None else {"config.optimizer.offload": on_host}) | precision


def precision_choices(precisions: Sequence[tuple[str, str]]) -> list[Overrides]:
    """Overrides for (params, compute) each; none leaves the config's own."""
    return [
        {"config.precision.params": params, "config.precision.compute": compute}
        for params, compute in precisions
    ] or [{}]
