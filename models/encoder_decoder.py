"""The encoder-decoder: an encoder of the source, and a decoder whose layers attend to it.

The Transformer of 2017 (Vaswani et al., https://arxiv.org/abs/1706.03762) and T5 (Raffel et al.
2020, https://arxiv.org/abs/1910.10683), by `ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
from flax import nnx

from models.beside import BESIDE, encoder_beside
from models.config import ModelConfig
from models.decoder import decoder_weights
from models.encoder import Encoder, encoder_weights
from models.memory_decoder import MemoryDecoder
from parallel.footprint import Weight
from parallel.remat import RematConfig
from parallel.rules import Rules


class EncoderDecoder(MemoryDecoder):
    """(source_tokens [B, S], tokens [B, T]) -> hidden x_BTD of the target after the final norm."""

    def __init__(
        self, config: ModelConfig, rules: Rules, remat: RematConfig, rngs: nnx.Rngs
    ) -> None:
        super().__init__(config, rules, remat, rngs)
        encoder, own_table = encoder_beside(config), not config.source_tied
        assert encoder is not None
        self.encoder = Encoder(encoder, rules, remat, rngs, axis=BESIDE, own_table=own_table)

    def features(self, batch: Mapping[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """What the encoder makes of the source."""
        names = ("tokens", "segments", "positions")
        source = {name: batch[f"source_{name}"] for name in names}
        return self.encoder(source, key, self if self.config.source_tied else None)

    def segments(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Those of the source."""
        return batch["source_segments"]


def encoder_decoder_weights(config: ModelConfig) -> tuple[list[Weight], list[Weight]]:
    """The weights of an `EncoderDecoder`: those of one block of the decoder, and all others."""
    block, outside = decoder_weights(config)
    encoder = encoder_beside(config)
    assert encoder is not None
    layer, others = encoder_weights(encoder, own_table=not config.source_tied)
    stacked = [weight.stacked(encoder.blocks, BESIDE) for weight in layer]
    return block, outside + stacked + others
