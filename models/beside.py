"""The encoder that stands beside a decoder, as a model of its own: of a source, or of an image."""

from __future__ import annotations

from dataclasses import replace

from models.config import ModelConfig
from models.vision_config import VisionConfig

BESIDE = "encoder_layers"  # the logical name of its layers, which stages do not divide


def encoder_beside(config: ModelConfig) -> ModelConfig | None:
    """Its shape; None where a model has no such encoder."""
    if config.family == "encoder_decoder":
        return replace(
            config,
            family="encoder",
            layers=config.encoder_layers,
            encoder_layers=0,
            cross="none",
            source_tied=True,
            head_scale=False,
            token_head=False,
        )
    if config.family == "vision_language":
        return _vit(config)
    return None


def beside_length(config: ModelConfig, source_length: int) -> int:
    """What a row has for it: tokens of a source, or patches of an image."""
    return config.vision.patches if config.family == "vision_language" else source_length


def _vit(config: ModelConfig) -> ModelConfig:
    """The ViT of `config.vision`."""
    vision = config.vision
    images = VisionConfig(vision.image_size, vision.patch_size, vision.channels)
    return ModelConfig(
        family="vision",
        vocab_size=config.vocab_size,
        layers=vision.layers,
        embed_dim=vision.embed_dim,
        mlp_dim=vision.mlp_dim,
        heads=vision.heads,
        kv_heads=vision.heads,
        head_dim=vision.embed_dim // vision.heads,
        norm="layer",
        positions="learned",
        max_length=vision.patches,
        activation="gelu",
        gated=False,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        init_std=config.init_std,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        attention=config.attention,
        unroll=config.unroll,
        vision=images,
        token_head=False,
    )
