"""Which tokens stand in which row: a plan made from the documents' lengths alone.

A document of n tokens has n - 1 targets. It is cut into pieces of at most T inputs, each with its
T targets (so neighbours share one token and no target is lost); a row is one or more pieces.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data.corpus import Corpus

Batch = dict[str, np.ndarray]


class RowPlan(Protocol):
    """The rows of a corpus, of one shape: what they are, before anything is drawn for them."""

    @property
    def rows(self) -> int:
        """The number of rows."""

    @property
    def length(self) -> int:
        """Positions in a row of text."""

    @property
    def tokens(self) -> int:
        """Those that are no padding, in all."""

    def fill(self, corpus: Corpus, rows: np.ndarray) -> Batch:
        """The rows of those numbers; -1 stands for a row of padding."""


@dataclass(frozen=True)
class Plan:
    """The rows of one length.

    Attributes:
      length: T, positions in a row.
      first: number of each row's first piece, and at the end of all pieces, int64 [rows + 1].
      start: position in the corpus of each piece's first input, int64 [pieces], row by row.
      count: its inputs, int64 [pieces].
    """

    length: int
    first: np.ndarray
    start: np.ndarray
    count: np.ndarray

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.first) - 1

    @property
    def tokens(self) -> int:
        """The number of targets."""
        return int(self.count.sum())

    def fill(self, corpus: Corpus, rows: np.ndarray) -> Batch:
        """Those rows; a row number of -1 stands for a row of padding.

        Returns:
          int32 [len(rows), T] each: `tokens`, `targets`, `segments` (1.. in each row, 0 where there
          is padding) and `positions` (from 0 in each piece); and the labels that documents have,
          int32 [len(rows)], of rows of one piece.
        """
        names = ("tokens", "targets", "segments", "positions")
        batch = {name: np.zeros(len(rows) * self.length, np.int32) for name in names}
        rows = np.asarray(rows, np.int64)
        pieces_in = np.where(rows < 0, 0, self.first[rows + 1] - self.first[rows])
        segment = aranges(pieces_in)  # of each piece in its row, from 0
        piece = segment + np.repeat(self.first[rows], pieces_in)
        count = self.count[piece]
        before = np.cumsum(count) - count  # inputs in earlier pieces of the batch
        row = np.repeat(np.arange(len(rows)), pieces_in)
        of_row_before = before[np.searchsorted(row, row)]
        position = aranges(count)
        at = np.repeat(row * self.length + before - of_row_before, count) + position
        source = np.repeat(self.start[piece], count) + position
        batch["tokens"][at] = corpus.take(source)
        batch["targets"][at] = corpus.take(source + 1)
        batch["segments"][at] = np.repeat(segment + 1, count)
        batch["positions"][at] = position
        first = self.start[np.where(rows < 0, 0, self.first[rows])]
        document = np.searchsorted(corpus.starts, first, side="right") - 1
        document = np.where(rows < 0, -1, document)
        shaped = {name: flat.reshape(len(rows), self.length) for name, flat in batch.items()}
        return shaped | labels(corpus, document)


def labels(corpus: Corpus, documents: np.ndarray) -> Batch:
    """`label_<task>` of documents, int32 [rows]; -1 for number -1, which stands for no document."""
    return {
        name: np.where(documents < 0, -1, column[documents]).astype(np.int32)
        for name, column in corpus.columns.items()
        if name.startswith("label_")
    }


def aranges(counts: np.ndarray) -> np.ndarray:
    """`arange(c)` for every count, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def make_plans(
    corpus: Corpus, length: int, packing: str, buckets: tuple[int, ...] = ()
) -> list[Plan]:
    """The rows of a corpus: one plan, or one for each bucket that has any.

    Args:
      corpus: documents.
      length: T.
      packing: `packed`: several pieces a row, best fit, longest first; `none`: one piece a row of
        T; `buckets`: one piece a row of the shortest bucket that holds it.
      buckets: row lengths, rising, the last one `length`.
    """
    start, count = cut(corpus.starts, corpus.lengths, length)
    if packing == "packed":
        return [_plan(length, best_fit(count, length), start, count)]
    if packing == "none":
        return [_plan(length, np.arange(len(count)), start, count)]
    assert packing == "buckets", packing
    of_bucket = np.searchsorted(buckets, count)
    here = [(size, of_bucket == number) for number, size in enumerate(buckets)]
    return [
        _plan(size, np.arange(mask.sum()), start[mask], count[mask])
        for size, mask in here
        if mask.any()
    ]


def waste(plans: Sequence[RowPlan]) -> float:
    """The fraction of all positions that is padding."""
    positions = sum(plan.rows * plan.length for plan in plans)
    return 1 - sum(plan.tokens for plan in plans) / max(positions, 1)


def cut(starts: np.ndarray, lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of documents: start and number of inputs of each, int64 [pieces]."""
    targets = np.maximum(lengths - 1, 0)
    pieces_in = -(-targets // length)
    offset = aranges(pieces_in) * length
    count = np.minimum(np.repeat(targets, pieces_in) - offset, length)
    return np.repeat(starts, pieces_in) + offset, count


def best_fit(count: np.ndarray, length: int) -> np.ndarray:
    """The row of each piece, int64 [pieces]: longest first, into the fullest row that holds it.

    Pieces of one size and rows of one free space are moved together, so the time grows with the
    number of sizes and not of pieces. Source: Krell et al. 2021, https://arxiv.org/abs/2107.02027
    """
    row_of = np.empty(len(count), np.int64)
    if not len(count):
        return row_of
    order = np.argsort(-count, kind="stable")
    sizes, begins = np.unique(-count[order], return_index=True)
    free: dict[int, list[np.ndarray]] = {}  # free space -> blocks of row numbers
    spaces: list[int] = []  # its keys, sorted
    rows = 0

    def put(space: int, block: np.ndarray) -> None:
        if space and len(block):
            if space not in free:
                free[space] = []
                insort(spaces, space)
            free[space].append(block)

    for size, pieces in zip((-sizes).tolist(), np.split(order, begins[1:]), strict=True):
        while len(pieces):
            i = bisect_left(spaces, size)
            if i < len(spaces):
                space = spaces[i]
                block = free[space].pop()
                if not free[space]:
                    del free[space], spaces[i]
            else:
                space = length
                block = np.arange(rows, rows + -(-len(pieces) // (length // size)))
                rows += len(block)
            each = space // size  # pieces that fit in one such row
            used = min(len(block), -(-len(pieces) // each))
            now, pieces = pieces[: used * each], pieces[used * each :]
            row_of[now] = np.repeat(block[:used], each)[: len(now)]
            in_last = len(now) - (used - 1) * each
            put(space - each * size, block[: used - 1])
            put(space - in_last * size, block[used - 1 : used])
            put(space, block[used:])
    return row_of


def _plan(length: int, row_of: np.ndarray, start: np.ndarray, count: np.ndarray) -> Plan:
    order = np.argsort(row_of, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(row_of))]).astype(np.int64)
    return Plan(length, first, start[order], count[order])
