"""Which text is in which row of the batch, and where its tokens lie: plain Python, no array.

Rows are taken by prompts in order as they become free (continuous batching: Yu et al. 2022, Orca,
https://www.usenix.org/conference/osdi22/presentation/yu). With a pool, a text takes blocks as it
grows; where none is free, the text that came last gives its own back and waits to be read again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from generation.block_pool import BlockPool
from generation.text import Text
from models.kv_cache import CacheShape


@dataclass(eq=False)
class Request:
    """A prompt, and the text that follows it.

    Attributes:
      number: among all prompts; decides with the seed what is drawn.
      prompt: tokens that the decoder reads.
      text: grows by what is generated.
      most: tokens to generate at most.
      source: tokens that an encoder reads, of an encoder-decoder.
      patches: of the image [P, K], of a model that reads one.
      adapter: its number among those that are served together; -1: none.
    """

    number: int
    prompt: list[int]
    text: Text
    most: int
    source: list[int] | None = None
    patches: np.ndarray | None = None
    adapter: int = -1

    @property
    def tokens(self) -> list[int]:
        """All that there are: the prompt, and what was generated."""
        return self.prompt + self.text.tokens


@dataclass(eq=False)
class Row:
    """A row in use.

    Attributes:
      request: whose text it is.
      index: of the row, in the batch.
      cached: tokens that the cache has, images before them counted.
      asked: tokens generated or asked of the device, and not read yet.
      blocks: its own and shared ones, in order; none without a pool.
      shared: tokens of the prompt that were in the cache already.
    """

    request: Request
    index: int
    cached: int
    asked: int
    blocks: list[int] = field(default_factory=list)
    shared: int = 0


class Rows:
    """The rows of a batch.

    Args:
      shape: of the cache.
      parts: that the batch is divided into, each with a pool of its own.
      before: tokens of an image, which stand before every prompt.
      sharing: rows may read the blocks of others that begin alike.
    """

    def __init__(self, shape: CacheShape, parts: int, *, before: int = 0, sharing: bool) -> None:
        self.shape, self.parts, self.before, self.sharing = shape, parts, before, sharing
        self.rows: list[Row | None] = [None] * shape.rows
        self.waiting: deque[Request] = deque()
        self.pools = [
            BlockPool(shape.blocks, shape.block) for _ in range(parts if shape.block else 0)
        ]
        self.gave_way = 0  # texts that had to be read again
        self.most_used = 0  # blocks of all pools at a time

    def active(self) -> Iterator[Row]:
        """The rows in use."""
        return (row for row in self.rows if row is not None)

    def admit(self) -> list[Row]:
        """Gives free rows to those who wait, in order.

        Two that begin alike are not admitted together: the second one shares what the first one's
        call computes.
        """
        admitted: list[Row] = []
        while self.waiting:
            request = self.waiting[0]
            if any(self._alike(row, request) for row in admitted):
                break
            index = self._free_row(request)
            if index is None:
                break
            self.waiting.popleft()
            row = Row(request, index, 0, len(request.text.tokens) + 1)
            if self.pools:
                self._take_blocks(row)
            self.rows[index] = row
            admitted.append(row)
        return admitted

    def part(self, row: Row) -> int:
        """The part of the batch that a row is in."""
        return row.index // (self.shape.rows // self.parts)

    def begun(self, row: Row) -> None:
        """The tokens of a row are in the cache."""
        row.cached = self.before + len(row.request.tokens)
        if self.pools and self.sharing:
            self.pools[self.part(row)].hold(row.blocks, row.request.tokens)

    def step(self) -> list[Row | None]:
        """The rows that ask for one token more, each in its place, with room for it."""
        asking = set()
        for row in sorted(self.active(), key=lambda row: row.request.number):
            if self.holds(row) and row.asked < row.request.most and self._grow(row):
                asking.add(row)
        self.most_used = max(self.most_used, sum(pool.used for pool in self.pools))
        return [row if row in asking else None for row in self.rows]

    def holds(self, row: Row) -> bool:
        """Whether a row is still in use: it may have ended or given way."""
        return self.rows[row.index] is row

    def _grow(self, row: Row) -> bool:
        """Makes room for one more token; False where the row itself had to give way."""
        if self.pools:
            pool = self.pools[self.part(row)]
            while len(row.blocks) < pool.needed(row.cached + 1):
                if pool.free:
                    row.blocks.append(pool.take())
                    continue
                beside = [r for r in self.active() if self.part(r) == self.part(row)]
                last = max(beside, key=lambda r: r.request.number)
                self._give_way(last)
                if last is row:
                    return False
        row.cached += 1
        row.asked += 1
        return True

    def _give_way(self, row: Row) -> None:
        """Ends the use of a row whose text is to go on before all others that wait."""
        self.free(row)
        self.waiting.appendleft(row.request)
        self.gave_way += 1

    def free(self, row: Row) -> None:
        """Ends the use of a row; its blocks go back to the pool."""
        assert self.holds(row)
        self.rows[row.index] = None
        for number in row.blocks:
            self.pools[self.part(row)].release(number)
        row.blocks = []

    def table(self, rows: Iterable[Row | None]) -> np.ndarray:
        """The blocks of some rows, int32 [rows, most of a row]; 0 beyond those that there are."""
        lists = [[] if row is None else row.blocks for row in rows]
        table = np.zeros((len(lists), self.shape.row_blocks), np.int32)
        for line, blocks in zip(table, lists, strict=True):
            line[: len(blocks)] = blocks
        return table

    def _alike(self, row: Row, request: Request) -> bool:
        """Whether a row that is admitted now will hold more of a request's beginning."""
        if not (self.pools and self.sharing):
            return False
        pool, tokens = self.pools[self.part(row)], request.tokens
        end = (len(pool.holding(tokens)) + 1) * pool.block
        return len(tokens) > end and row.request.tokens[:end] == tokens[:end]

    def _free_row(self, request: Request) -> int | None:
        """A free row for a request, in the part with the most room."""
        size = self.shape.rows // self.parts
        possible = [i for i, row in enumerate(self.rows) if row is None]
        if not self.pools:
            return min(possible, default=None)
        # One block more than the prompt needs: its first token has a place.
        needed = self.pools[0].needed(self.before + len(request.tokens) + 1)
        possible = [i for i in possible if self.pools[i // size].free >= needed]
        return max(possible, key=lambda i: (self.pools[i // size].free, -i), default=None)

    def _take_blocks(self, row: Row) -> None:
        pool, tokens = self.pools[self.part(row)], row.request.tokens
        if self.sharing:
            row.blocks = pool.holding(tokens)
            for number in row.blocks:
                pool.use(number)
            row.shared = len(row.blocks) * pool.block
        while len(row.blocks) < pool.needed(self.before + len(tokens)):
            row.blocks.append(pool.take())

    def in_use(self) -> tuple[int, int]:
        """Blocks of all pools in use, and the tokens in them; those of a shared one count once."""
        live: dict[tuple[int, int], int] = {}
        for row in self.active():
            for place, number in enumerate(row.blocks):
                filled = min(self.shape.block, row.cached - place * self.shape.block)
                at = self.part(row), number
                live[at] = max(live.get(at, 0), filled)
        return sum(pool.used for pool in self.pools), sum(live.values())
