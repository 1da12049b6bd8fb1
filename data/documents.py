"""What a document is, and which are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

HELD_SHARE = 0.05
HELD, TRAINED = 0, 2**64 - 1  # scores of documents whose side is already settled


class Document(NamedTuple):
    """A text and what belongs to it.

    Attributes:
      score: a hash of the document's identity, uniform over uint64, that decides whether it is held
        out.
      text: what is learnt; of a pair, the target.
      source: of a pair, what the target is made from.
      labels: the class in each of `config.objective.tasks`, in their order.
      image: uint8 [height, width, channels].
    """

    score: int
    text: str
    source: str | None = None
    labels: tuple[int, ...] = ()
    image: np.ndarray | None = None


def texts_of(document: Document) -> list[str]:
    """Source and text, or the text alone."""
    return [document.text] if document.source is None else [document.source, document.text]


Documents = Callable[[], Iterator[Document]]


def score(identity: str) -> int:
    """A uniform number of 64 bits for a document's name."""
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "little")


def held_out(scores: np.ndarray) -> np.ndarray:
    """Which documents are held out: about 5%, at least one, never all. uint64 [n] -> bool [n]."""
    held = scores < np.uint64(int(HELD_SHARE * 2**64))
    if len(held) > 1 and not held.any():
        held[np.argmin(scores)] = True
    if len(held) > 1 and held.all():
        held[np.argmax(scores)] = False
    return held
