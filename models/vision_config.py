"""The images of a model, and the ViT that stands beside a decoder: part of `ModelConfig`."""

from __future__ import annotations

from dataclasses import dataclass

PROJECTORS = ("linear", "mlp")
SHAPE = ("layers", "embed_dim", "mlp_dim", "heads")  # of the ViT beside a decoder


@dataclass(frozen=True)
class VisionConfig:
    """Images, and what reads them beside a decoder (`config.vision`).

    Attributes:
      image_size: pixels of an image's side; 0: the model reads no images.
      patch_size: pixels of a patch's side.
      channels: values of a pixel: 1 (grey) or 3 (red, green, blue).
      layers, embed_dim, mlp_dim, heads: of the ViT beside a decoder; 0 where the ViT is the model
        itself, whose shape is `config.model`'s.
      projector: how its features become tokens of the decoder: `linear`, or `mlp` with one hidden
        layer as wide as the decoder (Liu et al. 2024, https://arxiv.org/abs/2310.03744).
    """

    image_size: int = 0
    patch_size: int = 16
    channels: int = 3
    layers: int = 0
    embed_dim: int = 0
    mlp_dim: int = 0
    heads: int = 0
    projector: str = "linear"

    def __post_init__(self) -> None:
        if self.projector not in PROJECTORS:
            raise ValueError(
                f"config.vision.projector = {self.projector!r}: choose one of "
                f"{', '.join(PROJECTORS)}"
            )
        for name in ("image_size", *SHAPE):
            if getattr(self, name) < 0:
                raise ValueError(f"config.vision.{name} = {getattr(self, name)}: 0 or more")
        if self.patch_size < 1:
            raise ValueError(f"config.vision.patch_size = {self.patch_size}: at least 1")
        if self.channels not in (1, 3):
            raise ValueError(
                f"config.vision.channels = {self.channels}: 1 (grey) or 3 (red, green, blue)"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"config.vision.patch_size = {self.patch_size} does not divide "
                f"config.vision.image_size = {self.image_size}; an image is whole patches"
            )
        if self.heads and self.embed_dim % self.heads:
            raise ValueError(
                f"config.vision.heads = {self.heads} does not divide config.vision.embed_dim = "
                f"{self.embed_dim}; every head has an equal share of it"
            )

    @property
    def patches(self) -> int:
        """Patches of an image, P."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        """Values of a patch, K: rows, columns and channels."""
        return self.patch_size**2 * self.channels

    def check_family(self, family: str) -> None:
        """Refuses images for a family that reads none, and a ViT that lacks a shape or has two.

        Raises:
          ValueError: naming the key, its value and what would be right.
        """
        reads = family in ("vision", "vision_language")
        if reads != (self.image_size > 0):
            right = "give the pixels of a side" if reads else "set it to 0: it reads no images"
            raise ValueError(
                f"config.vision.image_size = {self.image_size}: config.model.family = {family!r}; "
                f"{right}"
            )
        beside = family == "vision_language"
        for name in SHAPE:
            if (getattr(self, name) > 0) != beside:
                right = (
                    "at least 1, of the ViT beside the decoder"
                    if beside
                    else "set it to 0; only a ViT beside a decoder (family 'vision_language') has "
                    "its shape here"
                )
                raise ValueError(f"config.vision.{name} = {getattr(self, name)}: {right}")
        if self.projector != "linear" and not beside:
            raise ValueError(
                f"config.vision.projector = {self.projector!r}: has no effect with "
                f"config.model.family = {family!r}; leave it 'linear'"
            )
