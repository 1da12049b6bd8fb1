"""One mask maker for all attention: which key may be seen by which query.

Everything goes by the index in the row, never by positions that restart in every document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class Mask:
    """The kind of a mask: static and hashable; the arrays that it needs travel in `MaskArrays`.

    Attributes:
      causal: a query sees no key after itself.
      window: a query sees only keys less than `window` away (sliding window; Beltagy et al. 2020,
        https://arxiv.org/abs/2004.05150), so 1 means itself alone; None for no limit.
      prefix: keys inside the row's prefix are seen by earlier queries too: bidirectional inside the
        prefix, causal after it (Raffel et al. 2020, https://arxiv.org/abs/1910.10683).
      segments: a query sees only its own document; segment 0 is padding, which sees nothing and is
        not seen (attention gives 0 there).
      before: virtual keys that stand before those of the row, learned ones of prefix tuning: every
        query sees them but one of padding. Key `before` is the row's first.
    """

    causal: bool = True
    window: int | None = None
    prefix: bool = False
    segments: bool = False
    before: int = 0

    def __post_init__(self) -> None:
        assert self.window is None or self.window >= 1, self.window
        assert self.causal or not self.prefix, "without causality everything is a prefix"

    @property
    def sees_all(self) -> bool:
        """No key is hidden from any query."""
        return not (self.causal or self.segments) and self.window is None


class MaskArrays(NamedTuple):
    """The arrays of a mask, int32; those that its `Mask` does not ask for are None.

    Attributes:
      q_segments_BT: document of every query, from 1; 0 = padding.
      k_segments_BS: document of every key; of virtual ones any number.
      prefix_B: length of every row's prefix.
    """

    q_segments_BT: Array | None = None
    k_segments_BS: Array | None = None
    prefix_B: Array | None = None


NO_ARRAYS = MaskArrays()


def visible(mask: Mask, q_index_T: Array, k_index_S: Array, arrays: MaskArrays) -> Array:
    """The boolean mask of a block of queries against a block of keys, True where a key is seen.

    Args:
      mask: the kind of mask.
      q_index_T: index in the row of the block's queries, [T'].
      k_index_S: index in the row of the block's keys, [S'].
      arrays: the segments of these queries, [B, T'], and keys, [B, S'], and the
        prefix lengths, [B].

    Returns:
      Booleans [B, 1, T', S'], or [1, 1, T', S'] where nothing depends on the row of the batch.
    """
    q, k = q_index_T[None, None, :, None], k_index_S[None, None, None, :] - mask.before
    seen = jnp.ones((1, 1, q.shape[2], k.shape[3]), bool)
    if mask.causal:
        seen = k <= q
    if mask.prefix:
        assert arrays.prefix_B is not None
        seen = seen | (k < arrays.prefix_B[:, None, None, None])
    if mask.window is not None:
        seen = seen & (jnp.abs(q - k) < mask.window)
    if mask.segments:
        assert arrays.q_segments_BT is not None
        assert arrays.k_segments_BS is not None
        # Padded queries get a number that no key has, which costs T and not T x S.
        q_segments = jnp.where(arrays.q_segments_BT > 0, arrays.q_segments_BT, -1)
        seen = seen & (q_segments[:, None, :, None] == arrays.k_segments_BS[:, None, None, :])
    if mask.before:
        real = jnp.ones((), bool)
        if mask.segments:
            assert arrays.q_segments_BT is not None
            real = arrays.q_segments_BT[:, None, :, None] > 0
        seen = jnp.where(k < 0, real, seen)
    return seen


def key_range(mask: Mask, q_start: int, q_stop: int, source_length: int) -> tuple[int, int]:
    """The keys [start, stop) outside which queries [q_start, q_stop) see nothing, known statically.

    Causality and windows bound it; documents and prefixes are data and cannot narrow it. Virtual
    keys stand before all others, so that with them nothing is hidden at the start.
    """
    start, stop, before = 0, source_length, mask.before
    if mask.window is not None:
        start = 0 if before else max(0, q_start - mask.window + 1)
        stop = min(stop, before + q_stop - 1 + mask.window)
    if mask.causal and not mask.prefix:
        stop = min(stop, before + q_stop)
    return min(start, stop), stop
