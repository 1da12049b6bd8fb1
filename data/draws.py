"""Random numbers of a row: a function of (seed, batch number, row) alone, on every machine."""

from __future__ import annotations

import numpy as np

from data.shuffle import hash64


def row_keys(rows: np.ndarray, *key: int) -> np.ndarray:
    """A key for every row, uint64 [rows]; `key` says of which batch."""
    keys = np.zeros(np.shape(rows), np.uint64)
    for part in (*key, rows):
        keys = hash64(keys ^ np.asarray(part).astype(np.uint64))
    return keys


def uniform(keys: np.ndarray, count: int, what: int) -> np.ndarray:
    """`count` numbers in [0, 1) for every key, float64 [rows, count].

    Args:
      keys: uint64 [rows].
      count: numbers of a row; the first few are the same whatever it is.
      what: the purpose, so that draws for different ones are independent.
    """
    counters = hash64(np.arange(count, dtype=np.uint64) + np.uint64(what << 32))
    return (hash64(keys[:, None] ^ counters) >> np.uint64(11)) * 2.0**-53
