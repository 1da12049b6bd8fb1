"""The weights that a model of each family declares, for the planner."""

from __future__ import annotations

from models.config import ModelConfig
from models.decoder import decoder_weights
from models.encoder_decoder import encoder_decoder_weights
from models.encoder_heads import encoder_heads_weights
from models.heads import heads_weights
from models.vision import vit_weights
from models.vision_language import vision_language_weights
from parallel.footprint import Weight

OF_FAMILIES = {
    "decoder": decoder_weights,
    "encoder": encoder_heads_weights,
    "encoder_decoder": encoder_decoder_weights,
    "vision_language": vision_language_weights,
}


def model_weights(config: ModelConfig) -> tuple[list[Weight], list[Weight]]:
    """Those of one block of the stack that stages divide, and those outside of it.

    Of the latter the table of tokens is the first, where there is one.
    """
    if config.family == "vision":
        block, outside = vit_weights(config)
        return block, outside + heads_weights(config)
    return OF_FAMILIES[config.family](config)
