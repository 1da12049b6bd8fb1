"""Masked language modelling: some tokens of every row are hidden and predicted."""

from __future__ import annotations

import numpy as np

from data.draws import uniform
from data.pack import Batch

MASKED, REPLACED = 0.8, 0.1  # of the chosen tokens; the rest stay as they are
CHOICE, FATE, VALUE = range(3)  # what numbers are drawn for


def mask_tokens(
    batch: Batch, keys: np.ndarray, *, rate: float, mask_id: int, special: np.ndarray
) -> Batch:
    """The batch with tokens chosen at random, each by itself, and hidden by the 80/10/10 rule.

    Of the chosen tokens 80% become the mask token, 10% a token drawn uniformly from all that stand
    for text, and 10% stay. Tokens that stand for no text are never chosen. Source: Devlin et al.
    2019, section 3.1 and appendix C.2, https://arxiv.org/abs/1810.04805. Rows are masked anew every
    time they come up (Liu et al. 2019, section 4.1, https://arxiv.org/abs/1907.11692).

    Args:
      batch: `tokens`, `segments` and more, int32 [rows, T].
      keys: of the rows, uint64 [rows].
      rate: the share of tokens that is chosen.
      mask_id: the mask token.
      special: ids that stand for no text, bool [vocab].

    Returns:
      The batch with other `tokens`; `targets`: the tokens as they were; `counted`: 1 where chosen.
    """
    tokens = batch["tokens"]
    T = tokens.shape[1]
    can = (batch["segments"] > 0) & ~special[tokens]
    chosen = can & (uniform(keys, T, CHOICE) < rate)
    fate = uniform(keys, T, FATE)
    text = np.flatnonzero(~special).astype(np.int32)
    drawn = text[(uniform(keys, T, VALUE) * len(text)).astype(np.int64)]
    hidden = np.where(fate < MASKED, np.int32(mask_id), tokens)
    hidden = np.where((fate >= MASKED) & (fate < MASKED + REPLACED), drawn, hidden)
    return batch | {
        "tokens": np.where(chosen, hidden, tokens),
        "targets": tokens,
        "counted": chosen.astype(np.int32),
    }
