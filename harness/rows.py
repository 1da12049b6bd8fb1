"""What lm-eval asks, as the arrays of rows: a continuation's tokens after those of its context.

Contexts are cut as lm-eval's own backend for transformers cuts them: from the left, so that the
inputs of a row are no longer than the model's longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.pack import Batch
from data.shifted import as_source, shifted

SHORTEST = 32  # positions of the smallest bucket: below that a step is mostly overhead

Sizes = tuple[int, ...]  # positions of a row, and of its source where it has one


class Row(NamedTuple):
    """Tokens that are given, and tokens whose probability is asked; both are at least one."""

    given: Sequence[int]
    wanted: Sequence[int]


@dataclass(frozen=True)
class RowShape:
    """How rows become arrays.

    Attributes:
      longest: positions of a row, and of a source, at most (`config.model.max_length`).
      sources: what is given is the source of an encoder-decoder, not the start of the row.
      start_id: with sources, the first input.
      prefix: tokens that are given see each other (`config.objective.name = 'prefix_lm'`).
      multiple: of which the positions of a row are (`Rules.parts` of "residual_seq").
    """

    longest: int
    sources: bool = False
    start_id: int = 0
    prefix: bool = False
    multiple: int = 1

    def sizes(self, row: Row) -> Sizes:
        """The bucket of a row: powers of two, so that there are few programs to compile."""
        if self.sources:
            return self._bucket(len(row.wanted)), self._bucket(len(row.given))
        return (self._bucket(len(row.given) + len(row.wanted) - 1),)

    def _bucket(self, length: int) -> int:
        power = max(SHORTEST, 1 << (length - 1).bit_length())
        return -(-min(power, self.longest) // self.multiple) * self.multiple

    def batch(self, rows: Sequence[Row], sizes: Sizes, count: int) -> Batch:
        """The arrays of `count` rows of such a bucket; those that are lacking are padding.

        Returns:
          int32 `tokens`, `targets`, `segments`, `positions` and `counted` [count, T], 1 where a
          target is asked for; with sources what `data.shifted.as_source` gives, [count, S]; with
          a prefix `prefix` [count].
        """
        if self.sources:
            given = _padded([row.given[-self.longest :] for row in rows], sizes[1], count)
            wanted = _padded([row.wanted for row in rows], sizes[0], count)
            batch = shifted(*wanted, self.start_id)
            return batch | as_source(*given) | {"counted": batch["segments"]}
        whole = [[*row.given, *row.wanted][-(self.longest + 1) :] for row in rows]
        tokens, lengths = _padded([tokens[:-1] for tokens in whole], sizes[0], count)
        targets, _ = _padded([tokens[1:] for tokens in whole], sizes[0], count)
        index = np.arange(sizes[0], dtype=np.int32)
        segments = (index < lengths[:, None]).astype(np.int32)
        asked = np.zeros(count, np.int32)
        asked[: len(rows)] = [len(row.wanted) for row in rows]
        first = (lengths - asked)[:, None]  # the first target that is asked for
        batch = {
            "tokens": tokens,
            "targets": targets,
            "segments": segments,
            "positions": index * segments,
            "counted": segments * (index >= first),
        }
        # The last token that is given predicts the first that is asked for.
        return batch | ({"prefix": first[:, 0] + (lengths > 0)} if self.prefix else {})


def _padded(texts: list[Sequence[int]], width: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [count, width], 0 from the end of each text on, and their numbers [count]."""
    tokens, lengths = np.zeros((count, width), np.int32), np.zeros(count, np.int32)
    for number, text in enumerate(texts):
        tokens[number, : len(text)] = text
        lengths[number] = len(text)
    return tokens, lengths
