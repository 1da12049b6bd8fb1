"""Figures of a pipeline's table that memory and time follow from: slots, and ticks by content.

A table in Python takes a second where there are hundreds of micro-batches, and a search asks for
thousands. So figures are kept, and a long table's are those of two short ones: in the middle every
further `stages` micro-batches add the same ticks and, where slots grow at all, as many. That is so
of the schedules that ship; any other table is built whole and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from parallel.pipeline import PipelineConfig
from parallel.schedule import Schedule
from parallel.schedule_kinds import make_schedule
from parallel.schedule_program import make_program
from parallel.schedule_slots import BUFFERS

# Fill and drain are over after so many rounds of `stages` micro-batches. In zb_h1's lean form W's
# pile up one a round, until as many wait as may.
ROUNDS = 4
SLOW = ("zb_h1", "lean")
# A cell: for F, for B with its W, for B and for W alone the chunk, -1 where there is none.
KINDS = ("F", "BW", "B", "W")
Cell = tuple[int, int, int, int]
Row = tuple[Cell, ...]


@dataclass(frozen=True, eq=False)
class Table:
    """A schedule as counts.

    Attributes:
      stages, microbatches, chunks: p, m and v.
      name: of the schedule.
      path: of `parallel.schedule.Schedule`.
      capacity: buffer -> slots on every stage.
      cells: int[rows, stages, 4], different ticks: the chunk of each of `KINDS`, or -1.
      often: int[rows], how often each is there.
      transfers: how often a tick sends what is like a chunk's output to another stage.
    """

    name: str
    stages: int
    microbatches: int
    chunks: int
    path: str
    capacity: Mapping[str, int]
    cells: NDArray[np.int64]
    often: NDArray[np.int64]
    transfers: int

    @property
    def ticks(self) -> int:
        return int(self.often.sum())

    @property
    def apart(self) -> bool:
        """Whether some W is not fused with its B."""
        return bool((self.cells[..., KINDS.index("W")] >= 0).any())

    def runs(self, kind: str) -> NDArray[np.int64]:
        """int[stages, chunks]: how often each stage runs a kind of `KINDS`."""
        of = self.cells[..., KINDS.index(kind)]
        counts = [((of == chunk) * self.often[:, None]).sum(0) for chunk in range(self.chunks)]
        return np.stack(counts, 1)

    def position(self, stage: int, chunk: int) -> int:
        """See `parallel.schedule.Schedule.position`."""
        back = self.path == "v" and chunk % 2 == 1
        return chunk * self.stages + (self.stages - 1 - stage if back else stage)

    def lockstep(self, costs: Mapping[str, NDArray[np.float64]]) -> float:
        """`parallel.schedule_costs.lockstep(...).time` without transfers.

        Args:
          costs: kind of `KINDS` -> float[stages, chunks].
        """
        return float((self.tick_costs(costs).max(1) * self.often).sum())

    def work(self, costs: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """For each stage, the sum of its actions."""
        return (self.tick_costs(costs) * self.often[:, None]).sum(0)

    def tick_costs(self, costs: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """float[rows, stages]."""
        total = np.zeros(self.cells.shape[:2])
        stage = np.arange(self.stages)
        for kind, each in costs.items():
            chunk = self.cells[..., KINDS.index(kind)]
            total += np.where(chunk >= 0, each[stage, np.maximum(chunk, 0)], 0.0)
        return total


def table_for(pipeline: PipelineConfig, stages: int, microbatches: int) -> Table:
    """The figures of the table that a pipeline runs.

    Raises:
      ValueError: see `PipelineConfig.table`.
    """
    schedule, chunks, form = pipeline.schedule, pipeline.chunks, pipeline.form
    by_name = PipelineConfig(
        schedule, pipeline.microbatches, chunks, form, pipeline.balance, pipeline.layers
    )
    # A subclass, and whatever else a config says of its table, is not equal to that.
    if pipeline == by_name:
        return table(schedule, stages, microbatches, chunks, form)
    return _own(pipeline, stages, microbatches)


@lru_cache(maxsize=256)
def _own(pipeline: PipelineConfig, stages: int, microbatches: int) -> Table:
    return counted(pipeline.table(stages, microbatches))


@lru_cache(maxsize=4096)
def table(schedule: str, stages: int, microbatches: int, chunks: int, form: str) -> Table:
    """The figures of a schedule by name; `chunks` 0 and `form` "" are those that it usually has.

    Raises:
      ValueError: see `parallel.schedule_kinds.make_schedule`.
    """
    rounds = stages + 2 if (schedule, form) == SLOW else ROUNDS
    long = rounds * stages + microbatches % stages
    if microbatches <= long + stages:
        return _whole(schedule, stages, microbatches, chunks, form)
    one = _whole(schedule, stages, long, chunks, form)
    two = _whole(schedule, stages, long + stages, chunks, form)
    more = (microbatches - long) // stages
    rows = _rows(one)
    for row, count in _rows(two).items():
        rows[row] += more * (count - rows[row])
    rows = Counter({row: count for row, count in rows.items() if count})
    capacity = {
        buffer: size + more * (two.capacity[buffer] - size) for buffer, size in one.capacity.items()
    }
    return _table(one, microbatches, capacity, rows)


@cache
def _whole(schedule: str, stages: int, microbatches: int, chunks: int, form: str) -> Table:
    """The figures of a shipped schedule's table that is built."""
    return counted(make_schedule(schedule, stages, microbatches, chunks or None, form or None))  # type: ignore[arg-type]


def counted(made: Schedule) -> Table:
    """The figures of any table."""
    program = make_program(made)
    rows: Counter[Row] = Counter()
    for number, tick in enumerate(made.ticks):
        row = []
        for stage, cell in enumerate(tick):
            chunk = {action.kind: action.chunk for action in cell}
            together = bool(program.fused[number, stage])
            row.append(
                (
                    chunk.get("F", -1),
                    chunk["B"] if together else -1,
                    -1 if together else chunk.get("B", -1),
                    -1 if together else chunk.get("W", -1),
                )
            )
        rows[tuple(row)] += 1
    sends = sum(any(a != b for a, b in transfer.pairs) for transfer in program.transfers)
    empty = np.empty(0, np.int64)
    p, m, v = made.stages, made.microbatches, made.chunks
    frame = Table(made.name, p, m, v, made.path, {}, empty, empty, sends)
    capacity = {buffer: program.slots.capacity(buffer) for buffer in BUFFERS}
    return _table(frame, m, capacity, rows)


def _table(
    frame: Table, microbatches: int, capacity: Mapping[str, int], rows: Counter[Row]
) -> Table:
    return Table(
        frame.name,
        frame.stages,
        microbatches,
        frame.chunks,
        frame.path,
        capacity,
        np.array(list(rows), np.int64),
        np.array(list(rows.values()), np.int64),
        frame.transfers,
    )


def _rows(of: Table) -> Counter[Row]:
    rows: Counter[Row] = Counter()
    for row, count in zip(of.cells.tolist(), of.often.tolist(), strict=True):
        rows[tuple(tuple(cell) for cell in row)] = count
    return rows
