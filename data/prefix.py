"""Prefix language modelling: the start of every row is given, the rest is predicted."""

from __future__ import annotations

import numpy as np

from data.draws import uniform
from data.pack import Batch

LENGTH = 0  # what a number is drawn for


def draw_prefix(batch: Batch, keys: np.ndarray) -> Batch:
    """The batch with a prefix drawn for every row, uniformly from 1 to the tokens that it has.

    Source: Raffel et al. 2020, sections 3.2.1 and 3.3.4, https://arxiv.org/abs/1910.10683

    Args:
      batch: rows of one document each: `segments` and more, int32 [rows, T].
      keys: of the rows, uint64 [rows].

    Returns:
      The batch and `prefix`, int32 [rows], 0 for a row of padding; `counted`, int32 [rows, T]: 1
      where the target is a token after the prefix. The first of those is the target of the prefix's
      last token, which therefore counts.
    """
    real = batch["segments"] > 0
    count = real.sum(axis=1)
    drawn = 1 + (uniform(keys, 1, LENGTH)[:, 0] * count).astype(np.int32)
    prefix = np.where(count > 0, drawn, 0).astype(np.int32)
    counted = real & (np.arange(real.shape[1]) >= prefix[:, None] - 1)
    return batch | {"prefix": prefix, "counted": counted.astype(np.int32)}
