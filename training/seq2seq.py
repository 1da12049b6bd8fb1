"""Sequence to sequence: each token of a target predicts the next, given its source.

The loss is the same for translations and for spans that were cut out of a text: their batches
differ (`config.objective`).
"""

from __future__ import annotations

from models.config import ModelConfig
from models.encoder_decoder import EncoderDecoder
from parallel.pipeline import PipelineConfig
from parallel.remat import RematConfig
from parallel.rules import Rules
from training.causal_lm import next_token
from training.losses import LossConfig
from training.state import Model


def seq2seq(
    config: ModelConfig,
    loss: LossConfig,
    rules: Rules,
    remat: RematConfig,
    pipeline: PipelineConfig | None = None,
) -> Model:
    """An encoder-decoder whose every token of the target predicts the next."""
    return next_token(EncoderDecoder, config, loss, rules, remat, pipeline)
