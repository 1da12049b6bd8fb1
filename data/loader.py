"""Batches by number: made ahead by threads, put on the devices one ahead of the step.

Batch k is a function of (seed, k) alone: whoever starts at step k, on however many processes, sees
the same batch k.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import cast

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data.corpus import Corpus
from data.draws import row_keys
from data.pack import Batch, RowPlan
from data.recipes import Recipe, as_it_is
from data.shuffle import shuffled

THREADS = 2  # a batch takes well under a millisecond; the second one covers a slow read
DEEPEST = 64  # batches made ahead at most, however small they are

SLOTS, ROWS = 0, 1  # what a shuffle is for: part of its key
TRAINED, HELD_OUT = 0, 1  # what the draws of a row are for: part of its key


class TrainBatches(grain.MapDataset):
    """All batches there will ever be, by number.

    Each plan's rows are one endless line, shuffled anew every time it has gone through, and cut in
    batches. The plans (one, or one a bucket) take turns in a random order, as often as they have
    rows.

    Args:
      corpus: tokens.
      plans: rows.
      seed: decides every order.
      batch_size: B, rows of a batch over all processes.
      rows: those of the B that are wanted here.
      recipe: what is drawn for every row.
    """

    def __init__(
        self,
        corpus: Corpus,
        plans: Sequence[RowPlan],
        seed: int,
        batch_size: int,
        rows: np.ndarray,
        recipe: Recipe = as_it_is,
    ) -> None:
        super().__init__()
        self.corpus, self.plans, self.seed, self.batch_size = corpus, list(plans), seed, batch_size
        self.wanted, self.recipe = rows, recipe
        self.batches_in = np.array([-(-plan.rows // batch_size) for plan in plans])

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k: int) -> Batch:
        number, rows = self.choose(int(k))
        keys = row_keys(self.wanted, TRAINED, self.seed, int(k))
        return self.recipe(self.plans[number].fill(self.corpus, rows), keys)

    def choose(self, k: int) -> tuple[int, np.ndarray]:
        """The plan of batch k and its rows that are wanted here."""
        cycle, slot = divmod(k, int(self.batches_in.sum()))
        number = 0
        if len(self.plans) > 1:
            total = int(self.batches_in.sum())
            slot = int(shuffled(np.array([slot]), total, self.seed, cycle, SLOTS)[0])
            ends = np.cumsum(self.batches_in)
            number = int(np.searchsorted(ends, slot, side="right"))
            slot -= int(ends[number] - self.batches_in[number])
        batch = cycle * int(self.batches_in[number]) + slot
        epoch, row = np.divmod(batch * self.batch_size + self.wanted, self.plans[number].rows)
        return number, shuffled(row, self.plans[number].rows, self.seed, epoch, ROWS, number)


class HeldOutBatches(grain.MapDataset):
    """A fixed sample of the held-out rows in a fixed order; what is lacking at the end is padding.

    Args:
      corpus: tokens.
      plan: rows.
      batches: how many at most.
      batch_size: B, rows of a batch over all processes.
      rows: those of the B that are wanted here.
      recipe: what is drawn for every row, the same every time.
    """

    def __init__(
        self,
        corpus: Corpus,
        plan: RowPlan,
        batches: int,
        batch_size: int,
        rows: np.ndarray,
        recipe: Recipe = as_it_is,
    ) -> None:
        super().__init__()
        self.corpus, self.plan, self.batch_size = corpus, plan, batch_size
        self.wanted, self.recipe = rows, recipe
        self.batches = min(batches, -(-plan.rows // batch_size))

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, k: int) -> Batch:
        number = int(k) * self.batch_size + self.wanted
        there = number < self.plan.rows
        row = np.where(there, shuffled(np.where(there, number, 0), self.plan.rows, ROWS), -1)
        return self.recipe(self.plan.fill(self.corpus, row), row_keys(number, HELD_OUT))


class Loader:
    """An iterator of batches that are made ahead in threads; a context manager that ends them.

    Args:
      batches: all batches by number.
      start: number of the first.
      prefetch_bytes: memory for batches made ahead; at least one is.
      batch_bytes: bytes of the largest batch.

    Attributes:
      wanted: the rows of the global batch that it gives, int64 [rows].
      depth: batches made ahead.
      seconds_blocked: seconds that `next` has waited, over all calls.
    """

    def __init__(
        self,
        batches: TrainBatches | HeldOutBatches,
        start: int,
        prefetch_bytes: int,
        batch_bytes: int,
    ) -> None:
        self.wanted = batches.wanted
        self.batch_size = batches.batch_size
        self.depth = max(1, min(prefetch_bytes // max(batch_bytes, 1), DEEPEST))
        self.seconds_blocked = 0.0
        options = grain.ReadOptions(
            num_threads=min(THREADS, self.depth), prefetch_buffer_size=self.depth
        )
        self._iterator = iter(batches.to_iter_dataset(options))
        if start:
            grain.experimental.set_next_index(self._iterator, start)
        self._iterator.start_prefetch()  # ready by the time the step is compiled

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        try:
            return cast(Batch, next(self._iterator))
        finally:
            self.seconds_blocked += time.perf_counter() - began

    def close(self) -> None:
        """Ends the threads; batches made ahead are dropped."""
        self._iterator.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def local_rows(mesh: Mesh, spec: PartitionSpec, batch_size: int) -> np.ndarray:
    """The rows of a batch that devices of this process hold, sorted, int64 [rows].

    With a mesh axis other than the batch's across processes, several processes hold the same rows.
    """
    sharding = NamedSharding(mesh, PartitionSpec(spec[0] if len(spec) else None))
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def process_rows(batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    """Part `process_index` of the rows when a batch is cut in `process_count` equal parts.

    Raises:
      ValueError: it does not divide.
    """
    if batch_size % process_count:
        raise ValueError(
            f"config.data.batch_size = {batch_size} does not divide by the {process_count} "
            f"processes; choose a multiple of {process_count}"
        )
    size = batch_size // process_count
    return np.arange(process_index * size, (process_index + 1) * size)


def to_device(
    batch: Batch, mesh: Mesh, spec: PartitionSpec, rows: np.ndarray, batch_size: int
) -> dict[str, jax.Array]:
    """Global arrays [B, ...] of which this process gives the rows that its devices hold.

    Returns at once: the copies run behind.

    Args:
      batch: this process's rows, [rows, ...] each.
      mesh: devices.
      spec: partition of [B, T].
      rows: number in the global batch of each row, sorted.
      batch_size: B.
    """

    def place(local: np.ndarray) -> jax.Array:
        sharding = NamedSharding(mesh, PartitionSpec(*tuple(spec)[: local.ndim]))

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            begin, end, _ = index[0].indices(batch_size)
            here = np.searchsorted(rows, begin)
            assert rows[here : here + end - begin].tolist() == list(range(begin, end))
            return local[here : here + end - begin, *index[1:]]

        shape = (batch_size, *local.shape[1:])
        return jax.make_array_from_callback(shape, sharding, part)

    return {name: place(local) for name, local in batch.items()}


def device_batches(
    loader: Loader, mesh: Mesh, spec: PartitionSpec
) -> Iterator[dict[str, jax.Array]]:
    """The loader's batches as global arrays, the copy of the next one always under way.

    Closing the loader is the caller's. A finite loader is given to its end.
    """
    ahead: dict[str, jax.Array] | None = None
    for batch in loader:
        now, ahead = ahead, to_device(batch, mesh, spec, loader.wanted, loader.batch_size)
        if now is not None:
            yield now
    if ahead is not None:
        yield ahead
