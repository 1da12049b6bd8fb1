"""Captions of images: next-token prediction over the text of an image."""

from __future__ import annotations

from models.config import ModelConfig
from models.vision_language import CrossVisionLanguage, VisionLanguage
from parallel.pipeline import PipelineConfig
from parallel.remat import RematConfig
from parallel.rules import Rules
from training.causal_lm import next_token
from training.losses import LossConfig
from training.state import Model


def captioning(
    config: ModelConfig,
    loss: LossConfig,
    rules: Rules,
    remat: RematConfig,
    pipeline: PipelineConfig | None = None,
) -> Model:
    """A decoder that reads an image, before its text or by attention; ViT and projector are the
    first stage's.
    """
    kind = VisionLanguage if config.cross == "none" else CrossVisionLanguage
    return next_token(kind, config, loss, rules, remat, pipeline)
