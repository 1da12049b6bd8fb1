"""What every layer knows of the rows of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax

from models.masks import Mask, MaskArrays

if TYPE_CHECKING:
    from models.cached_attention import LayerCache


class Memory(NamedTuple):
    """What cross-attention reads.

    Attributes:
      features_BSD: in the residual stream's layout; None where a cache has what layers made of
        them.
      segments_BS: int32, the document of each of them, from 1; 0 = padding. None where every token
        of a row sees all.
    """

    features_BSD: jax.Array | None
    segments_BS: jax.Array | None


class Rows(NamedTuple):
    """Arrays of a batch (`training.batch_arrays`) for its layers, and what else they all read.

    Attributes:
      segments: int32 [B, T], the document of every token, from 1; 0 = padding. None where each row
        is one document without padding.
      positions: int32 [B, T].
      weights: float32 [B, T], of tokens in the loss of the step, for the losses of routers; None
        leaves those out.
      prefix: int32 [B], tokens at the start of each row that see each other; None for none.
      bias: float32 [N, T, T], added to the scores of self-attention, or with a cache
        [B, N, T, S]; None for none.
      memory: what cross-attention reads; None where there is none.
      cache: of the layer, which has the tokens before these; None where rows are whole.
    """

    segments: jax.Array | None
    positions: jax.Array
    weights: jax.Array | None = None
    prefix: jax.Array | None = None
    bias: jax.Array | None = None
    memory: Memory | None = None
    cache: LayerCache | None = None

    def mask(self, *, causal: bool, window: int | None) -> tuple[Mask, MaskArrays]:
        """Which of these tokens see each other."""
        prefix = causal and self.prefix is not None
        segments = self.segments is not None
        mask = Mask(causal=causal, window=window, prefix=prefix, segments=segments)
        return mask, MaskArrays(self.segments, self.segments, self.prefix if prefix else None)


def rows_of(batch: Mapping[str, jax.Array], weights_BT: jax.Array | None = None) -> Rows:
    """The rows of a batch."""
    return Rows(batch["segments"], batch["positions"], weights_BT, batch.get("prefix"))
