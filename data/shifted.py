"""Arrays of rows that hold one text each: a source as it is, or targets with the inputs before
them.
"""

from __future__ import annotations

import numpy as np

from data.pack import Batch


def as_source(tokens: np.ndarray, count: np.ndarray) -> Batch:
    """`source_tokens`, `source_segments` and `source_positions`, int32 [rows, S].

    Args:
      tokens: int32 [rows, S], 0 from `count` on.
      count: tokens of each row, [rows].
    """
    segments, positions = _places(tokens, count)
    return {
        "source_tokens": tokens,
        "source_segments": segments,
        "source_positions": positions,
    }


def shifted(targets: np.ndarray, count: np.ndarray, start_id: int) -> Batch:
    """`tokens`, `targets`, `segments` and `positions`, int32 [rows, T]: every target's input is the
    target before it, the first one's is `start_id`.

    Args:
      targets: int32 [rows, T], 0 from `count` on.
      count: targets of each row, [rows].
      start_id: the first input.
    """
    segments, positions = _places(targets, count)
    tokens = np.zeros_like(targets)
    tokens[:, 0] = start_id
    tokens[:, 1:] = targets[:, :-1]
    return {
        "tokens": tokens * segments,
        "targets": targets,
        "segments": segments,
        "positions": positions,
    }


def _places(tokens: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(segments, positions) of one text a row."""
    index = np.arange(tokens.shape[1], dtype=np.int32)
    segments = (index < count[:, None]).astype(np.int32)
    return segments, index * segments
