"""Rows scored under any layout: how likely what is asked is, and whether greedy decoding gives it.

Logits of a whole batch never exist: they are formed and dropped a chunk at a time, the vocabulary
divided (`training.losses`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from data.loader import local_rows, to_device
from harness.rows import Row, RowShape, Sizes
from parallel.compilation import safe_compilation
from parallel.precision import PrecisionConfig
from parallel.zero import for_model
from training.micro_batches import Batch, counted
from training.state import Model

Step = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]


class Scored(NamedTuple):
    """The answer to one row.

    Attributes:
      number: the row's, in the order asked.
      log_prob: natural logarithm of the probability of all tokens that were asked for.
      greedy: whether each of them is the most likely one; of several that are, too.
    """

    number: int
    log_prob: float
    greedy: bool


def make_score_step(model: Model, precision: PrecisionConfig) -> Step:
    """(master params, batch) -> float32 [B] log-probabilities of what `batch["counted"]` asks for,
    bool [B] whether greedy decoding gives it; whole on every device. No dropout.
    """
    assert model.scores is not None, "this family predicts no next token"
    scores = model.scores

    def step(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        leaves, build = for_model(params, model.axes, model.rules, precision.compute)
        nll_BT, most_likely_BT = scores(build(leaves), batch)
        asked_BT = counted(batch).tokens_BT
        log_prob_B = -jnp.sum(asked_BT * nll_BT, axis=1)
        missed_B = jnp.sum(asked_BT * (1.0 - most_likely_BT), axis=1)
        return jax.reshard(log_prob_B, P(None)), jax.reshard(missed_B == 0.0, P(None))

    return step


@dataclass
class Scorer:
    """Scores rows in batches of like length.

    Attributes:
      tokens: positions of a batch, over all devices, at most, where one row a device is fewer.
      batches: how many it has run.
    """

    model: Model
    params: Any
    precision: PrecisionConfig
    mesh: jax.sharding.Mesh
    shape: RowShape
    tokens: int
    batches: int = 0
    _step: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        step = make_score_step(self.model, self.precision)
        self._step = jax.jit(step, compiler_options=safe_compilation())

    def __call__(self, rows: Sequence[Row]) -> Iterator[list[Scored]]:
        """The answers to rows, a batch at a time, the longest first.

        The next batch is under way while one is given, so a caller may write what it gets.
        """
        ahead: tuple[list[int], tuple[jax.Array, jax.Array]] | None = None
        for numbers, sizes, count in self._batches(rows):
            now, ahead = ahead, (numbers, self._run([rows[n] for n in numbers], sizes, count))
            if now is not None:
                yield self._fetch(*now)
        if ahead is not None:
            yield self._fetch(*ahead)

    def _batches(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], Sizes, int]]:
        """Numbers of rows, their bucket, and of how many rows the batch is."""
        buckets: dict[Sizes, list[int]] = {}
        for number, row in enumerate(rows):
            buckets.setdefault(self.shape.sizes(row), []).append(number)
        parts = self.model.rules.parts("batch")
        for sizes in sorted(buckets, key=sum, reverse=True):
            numbers = sorted(buckets[sizes], key=lambda n: -sum(map(len, rows[n])))
            fit = max(1, self.tokens // (sum(sizes) * parts))
            needed = -(-len(numbers) // parts)
            # Powers of two: another number of rows does not make another program.
            each = min(1 << (fit.bit_length() - 1), 1 << (needed - 1).bit_length())
            count = parts * each
            for start in range(0, len(numbers), count):
                yield numbers[start : start + count], sizes, count

    def _run(self, rows: list[Row], sizes: Sizes, count: int) -> tuple[jax.Array, jax.Array]:
        spec = self.model.rules.spec("batch seq")
        here = local_rows(self.mesh, spec, count)
        batch = {name: a[here] for name, a in self.shape.batch(rows, sizes, count).items()}
        self.batches += 1
        return self._step(self.params, to_device(batch, self.mesh, spec, here, count))

    @staticmethod
    def _fetch(numbers: list[int], arrays: tuple[jax.Array, jax.Array]) -> list[Scored]:
        log_probs, greedy = map(np.asarray, arrays)
        found = zip(numbers, log_probs, greedy, strict=False)  # rows of padding come last
        return [Scored(n, float(log_prob), bool(right)) for n, log_prob, right in found]
