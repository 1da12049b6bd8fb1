"""Span corruption: spans are left out of a text, and are what is predicted.

A piece of n tokens becomes a source, in which one sentinel stands for each span, and a target, in
which each span follows its sentinel; both end with the end token. Source: Raffel et al. 2020,
section 3.1.4 and figure 2, https://arxiv.org/abs/1910.10683. Numbers of tokens and of spans follow
from n alone; only where the spans are is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.draws import uniform
from data.pack import Batch
from data.shifted import as_source, shifted

NOISE, KEPT = range(2)  # what numbers are drawn for


@dataclass(frozen=True)
class Spans:
    """How spans are left out.

    Attributes:
      rate: share of the tokens that is left out.
      span_length: tokens of a span, on average.
    """

    rate: float
    span_length: float

    def counts(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens that are left out, spans) of pieces of so many tokens, int64 each.

        A piece of one token is counted as if it had two: nothing of it is left out, its target is a
        sentinel alone.
        """
        tokens = np.maximum(tokens, 2)
        noise = np.clip(np.rint(tokens * self.rate), 1, tokens - 1).astype(np.int64)
        spans = np.maximum(np.rint(noise / self.span_length), 1).astype(np.int64)
        return noise, np.minimum(spans, np.minimum(noise, tokens - noise))

    def lengths(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, target): lengths, the end token included, for pieces of two tokens or more."""
        noise, spans = self.counts(tokens)
        return tokens - noise + spans + 1, noise + spans + 1

    def piece_length(self, source_length: int, target_length: int) -> int:
        """The most tokens of which source and target hold what becomes of them; 0 for none."""
        sizes = np.arange(2, source_length + target_length)  # both hold more than the piece
        source, target = self.lengths(sizes)
        fits = (source <= source_length) & (target <= target_length)
        return int(sizes[fits].max(initial=0))

    def noise_mask(self, tokens: np.ndarray, width: int, keys: np.ndarray) -> np.ndarray:
        """Which tokens are left out, for pieces of `tokens` [rows] tokens: bool [rows, width].

        Spans that are kept and spans that are left out take turns, a kept one first.
        """
        noise, spans = self.counts(tokens)
        left_out = segment_lengths(noise, spans, uniform(keys, width, NOISE))
        kept = segment_lengths(np.maximum(tokens, 2) - noise, spans, uniform(keys, width, KEPT))
        turns = np.stack([kept, left_out], axis=2).reshape(len(tokens), -1)
        ends = np.minimum(np.cumsum(turns, axis=1), width)
        ended = _count(ends, width + 1)[:, :width]  # spans that end before each token
        number = np.cumsum(ended, axis=1)
        return (number % 2 == 1) & (np.arange(width) < tokens[:, None])


def segment_lengths(items: np.ndarray, segments: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Random lengths of at least 1 that sum to `items`, all divisions equally likely.

    Args:
      items: to be divided, int64 [rows], at least 1.
      segments: parts, int64 [rows], at least 1 and at most `items`.
      draws: uniform, float64 [rows, at least the most items]; the smallest say where a part ends.

    Returns:
      int64 [rows, most segments]; 0 after the last part.
    """
    index = np.arange(draws.shape[1])
    borders = np.where(index < items[:, None] - 1, draws, 2.0)  # between item i and i + 1
    last = np.take_along_axis(np.sort(borders, axis=1), segments[:, None] - 1, axis=1)
    ends = (borders < last).astype(np.int64)
    segment = np.cumsum(ends, axis=1) - ends
    beyond = segments.max(initial=1)
    return _count(np.where(index < items[:, None], segment, beyond), beyond + 1)[:, :beyond]


def _count(values: np.ndarray, below: int) -> np.ndarray:
    """How often each number below a bound is in each row: int64 [rows, n] -> [rows, below]."""
    rows = len(values)
    flat = np.arange(rows)[:, None] * below + values
    return np.bincount(flat.ravel(), minlength=rows * below).reshape(rows, below)


def corrupt_spans(
    batch: Batch,
    keys: np.ndarray,
    *,
    spans: Spans,
    sentinels: Sequence[int],
    start_id: int,
    end_id: int,
    source_length: int,
    target_length: int,
) -> Batch:
    """Sources and targets of pieces of documents.

    Args:
      batch: one piece a row, `tokens` and `segments`, int32 [rows, L], at most
        `spans.piece_length(source_length, target_length)` tokens each.
      keys: of the rows, uint64 [rows].
      spans: how they are left out.
      sentinels: their ids, for the first span, the second, ...
      start_id: the decoder's first input.
      end_id: ends sources and targets.
      source_length: S.
      target_length: T.

    Returns:
      `source_tokens`, `source_segments`, `source_positions` int32 [rows, S] and `tokens`,
      `targets`, `segments`, `positions` int32 [rows, T]; a row of padding stays one.
    """
    tokens, real = batch["tokens"], batch["segments"] > 0
    count = real.sum(axis=1)
    noise = spans.noise_mask(count, tokens.shape[1], keys)
    source = with_sentinels(tokens, real, ~noise, np.asarray(sentinels, np.int32))
    target = with_sentinels(tokens, real, noise, np.asarray(sentinels, np.int32))
    there = count > 0
    return as_source(*close(*source, there, end_id, source_length)) | shifted(
        *close(*target, there, end_id, target_length), start_id
    )


def with_sentinels(
    tokens: np.ndarray, real: np.ndarray, kept: np.ndarray, sentinels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, which of them stay): the first token of the i-th span that is not kept becomes
    sentinel i, the rest of it goes. [rows, L] each.
    """
    gone = real & ~kept
    first = gone & ~np.pad(gone, ((0, 0), (1, 0)))[:, :-1]
    number = np.maximum(np.cumsum(first, axis=1) - 1, 0)
    return np.where(first, sentinels[number], tokens), (real & kept) | first


def close(
    tokens: np.ndarray, stay: np.ndarray, there: np.ndarray, end_id: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that stay, moved together, an end after them where a row is `there`.

    Returns:
      int32 [rows, length], padded with 0, and how many there are, int64 [rows].
    """
    count = stay.sum(axis=1)
    row, column = np.nonzero(stay)
    closed = np.zeros((len(tokens), length), np.int32)
    closed[row, (np.cumsum(stay, axis=1) - 1)[row, column]] = tokens[row, column]
    closed[np.flatnonzero(there), count[there]] = end_id
    return closed, count + there
