"""What an objective wants of a document, beside its text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ImageShape:
    """The images that a model takes.

    Attributes:
      image_size: pixels a side.
      patch_size: pixels of a patch's side.
      channels: 1 (grey) or 3 (red, green, blue).
    """

    image_size: int
    patch_size: int
    channels: int

    def __post_init__(self) -> None:
        assert self.image_size % self.patch_size == 0, self
        assert self.channels in (1, 3), self


@dataclass(frozen=True)
class Parts:
    """The parts of documents that are read.

    Attributes:
      text: the text itself; not where images are classified.
      source: what the text is made from.
      tasks: what is classified, by name: the number of classes.
      image: the image, of that shape.
    """

    text: bool = True
    source: bool = False
    tasks: Mapping[str, int] = field(default_factory=dict)
    image: ImageShape | None = None


TEXT = Parts()
