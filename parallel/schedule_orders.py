"""A schedule from the order in which each stage does its work.

One of one's own, and how it is looked at:

    def ahead(stages, microbatches, most):
        # 1F1B with up to `most` micro-batches in flight on the first stage
        orders = []
        for stage in range(stages):
            held = min(microbatches, max(1, most - stage))  # forwards before the first backward
            order = [F(i) for i in range(held)]
            for i in range(microbatches):
                order += [B(i)] + [F(held + i)] * (held + i < microbatches)
            orders.append(order)
        return from_orders("ahead", orders)

    print(lockstep(ahead(4, 8, 6)).bubble, slots(ahead(4, 8, 6)).counts["residual"])
"""

from __future__ import annotations

from collections.abc import Sequence

from parallel.schedule import KINDS, Action, Path, Schedule, Value, check, where


def from_orders(
    name: str,
    orders: Sequence[Sequence[Action]],
    *,
    path: Path = "loop",
    single: bool = False,
    held: int | None = None,
) -> Schedule:
    """A checked schedule in which every stage keeps its order and starts each action early.

    Args:
      name: for messages and drawings.
      orders: for each stage, its actions, first to last. Without any W, each is fused with its B.
      path: of `Schedule`.
      single: whether a tick holds one action of a stage (a fused pair is one) or one of each kind.
      held: for orders without W: B and W are apart. Each tick is filled up with W's to the length
        of its longest cell, in number of actions; a stage that holds this many chunks for W (each
        from its F on) does one in any case.

    Raises:
      ValueError: an action is missing, there twice, or waits for one that never comes.
    """
    actions = [action for order in orders for action in order]
    if not actions:
        raise ValueError(f"schedule {name!r} has no actions: give each stage its F's and B's")
    for action in actions:
        if action.kind not in KINDS or min(action.microbatch, action.chunk) < 0:
            raise ValueError(
                f"schedule {name!r}: {action}; an action is F, B or W of a micro-batch and a chunk "
                "that are counted from 0"
            )
    frame = Schedule(
        name,
        (),
        len(orders),
        1 + max(action.microbatch for action in actions),
        1 + max(action.chunk for action in actions),
        path,
    )
    listed = any(action.kind == "W" for action in actions)
    if held is not None and (listed or single):
        why = "its orders list the W's" if listed else "a tick of a single action has no room"
        raise ValueError(f"schedule {name!r}: held = {held} would place W's, but {why}")
    rows = _packed(frame, orders, single=single, fuse=not listed and held is None)
    if held is not None:
        _fill(rows, held)
    schedule = Schedule(
        name,
        tuple(tuple(tuple(cell) for cell in row) for row in rows),
        *(frame.stages, frame.microbatches, frame.chunks, path),
    )
    check(schedule)
    return schedule


def _packed(
    frame: Schedule, orders: Sequence[Sequence[Action]], *, single: bool, fuse: bool
) -> list[list[list[Action]]]:
    """Ticks: each stage goes on in its order while its values are there and the cell has room."""
    rows: list[list[list[Action]]] = []
    made: set[Value] = set()  # in earlier ticks
    done = [0] * frame.stages
    while any(i < len(order) for i, order in zip(done, orders, strict=True)):
        row: list[list[Action]] = []
        now: list[Value] = []
        for stage, order in enumerate(orders):
            cell: list[Action] = []
            here: set[Value] = set()
            while done[stage] < len(order):
                action = order[done[stage]]
                full = cell and (single or KINDS.index(action.kind) <= KINDS.index(cell[-1].kind))
                value = frame.value(stage, action)
                if full or not all(v in made or v in here for v in frame.needs(value)):
                    break
                cell.append(action)
                here.add(value)
                done[stage] += 1
            if fuse and cell and cell[-1].kind == "B":
                cell.append(cell[-1]._replace(kind="W"))
            row.append(cell)
            now += here
        if not now:
            raise ValueError(_stuck(frame, orders, done, made, len(rows)))
        made.update(now)
        rows.append(row)
    return rows


def _stuck(
    frame: Schedule,
    orders: Sequence[Sequence[Action]],
    done: Sequence[int],
    made: set[Value],
    tick: int,
) -> str:
    """Why no stage can go on: best, what is in no order, or is late in the stage's own."""
    coming = {frame.value(s, a) for s, order in enumerate(orders) for a in order[done[s] :]}
    reasons = []
    for stage, order in enumerate(orders):
        if done[stage] < len(order):
            action = order[done[stage]]
            value = next(v for v in frame.needs(frame.value(stage, action)) if v not in made)
            other = frame.place(value[1])[0]
            order_of = "this" if other == stage else "that stage's"
            why = f"comes later in {order_of} order" if value in coming else "is in no order"
            text = f"{action} waits for {frame.named(value)}, which {why}"
            reasons.append((value in coming, other != stage, stage, text))
    *_, stage, text = min(reasons)
    return f"{where(frame, tick, stage)}: {text}"


def _fill(rows: list[list[list[Action]]], held: int) -> None:
    """Puts the W's into ticks that have room; a tick where all cells are as long takes all."""
    stages = len(rows[0])
    waiting: list[list[Action]] = [[] for _ in range(stages)]
    alive = [0] * stages
    tick = 0
    while tick < len(rows) or any(waiting):
        if tick == len(rows):
            rows.append([[] for _ in range(stages)])
        row = rows[tick]
        for stage, cell in enumerate(row):
            alive[stage] += sum(action.kind == "F" for action in cell)
            waiting[stage] += [a._replace(kind="W") for a in cell if a.kind == "B"]
        lengths = [len(cell) for cell in row]
        for stage, cell in enumerate(row):
            room = lengths[stage] < max(lengths) or min(lengths) == max(lengths)
            if waiting[stage] and (room or alive[stage] >= held):
                cell.append(waiting[stage].pop(0))
                alive[stage] -= 1
        tick += 1
