"""Rows that are one example each: a text, its source, its image, its labels, or some of these."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.corpus import Corpus
from data.images import to_patches
from data.pack import Batch, labels
from data.parts import Parts
from data.shifted import as_source, shifted


@dataclass(frozen=True)
class ExamplePlan:
    """The rows of a corpus, one a document.

    Attributes:
      rows: how many.
      length: T, tokens of a text at most, its end included.
      tokens: how many there are in all.
      parts: what a row has.
      source_length: S, tokens of a source at most, its end included.
      start_id: the first input of every text.
      end_id: the last target of every text, the last token of every source.
      brightest: the value of a pixel that stands for 1.0.
    """

    rows: int
    length: int
    tokens: int
    parts: Parts
    source_length: int
    start_id: int
    end_id: int
    brightest: int

    def fill(self, corpus: Corpus, rows: np.ndarray) -> Batch:
        """Those rows; a row number of -1 stands for a row of padding.

        Returns:
          What `parts` names: `tokens`, `targets`, `segments` and `positions` int32 [rows, T];
          `source_tokens`, `source_segments` and `source_positions` int32 [rows, S]; `patches`
          float32 [rows, patches, pixels], from 0 to 1; `label_<task>` int32 [rows], -1 where there
          is padding.
        """
        batch: Batch = {}
        columns = corpus.columns
        if self.parts.image is not None:
            assert corpus.images is not None
            images = corpus.images[columns["image"][rows]].astype(np.float32)
            images = images * (rows >= 0)[:, None, None, None].astype(np.float32)
            patches = to_patches(images, self.parts.image.patch_size)
            batch["patches"] = patches / np.float32(self.brightest)
        if self.parts.source:
            starts, counts = columns["source_starts"][rows], columns["source_lengths"][rows]
            batch |= as_source(*self._take(corpus, starts, counts, rows, self.source_length))
        if self.parts.text:
            starts, counts = corpus.starts[rows], corpus.lengths[rows]
            texts = self._take(corpus, starts, counts, rows, self.length)
            batch |= shifted(*texts, self.start_id)
        return batch | labels(corpus, rows)

    def _take(
        self, corpus: Corpus, starts: np.ndarray, counts: np.ndarray, rows: np.ndarray, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The tokens, cut to `width` with the end as the last one, and how many there are."""
        counts = np.where(rows < 0, 0, np.minimum(counts, width))
        tokens = corpus.rows(starts, counts, width)
        there = np.flatnonzero(counts)
        tokens[there, counts[there] - 1] = self.end_id
        return tokens, counts
