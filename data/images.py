"""Images with captions and labels, and the patches that a model sees of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.config import DataConfig
from data.documents import Document, score
from data.json_lines import json_rows, labels_of, text_of
from data.parts import ImageShape, Parts

DIGITS_SIZE, DIGITS_MOST = 8, 16  # pixels a side; the value of white
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_TASKS = {"digit": 10, "parity": 2}
IMAGE_FIELD = "image"


def to_patches(images: np.ndarray, patch_size: int) -> np.ndarray:
    """Images cut in patches: [n, height, width, channels] -> [n, patches, pixels of a patch].

    Patches go row by row, the pixels of one in order row, column, channel.
    Source: Dosovitskiy et al. 2021, section 3.1, https://arxiv.org/abs/2010.11929
    """
    n, height, width, channels = images.shape
    grid = images.reshape(
        n, height // patch_size, patch_size, width // patch_size, patch_size, channels
    )
    size = patch_size * patch_size * channels
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(n, -1, size)


def brightest(source: str) -> int:
    """The pixel value that stands for 1.0 in images of a source."""
    return DIGITS_MOST if source == "digits" else 255


def digit_documents(parts: Parts) -> Iterator[Document]:
    """1,797 digits written by 43 people, scanned, 8 x 8 pixels of 17 greys.

    Source: Alpaydin and Kaynak 1998, https://doi.org/10.24432/C50P49, as scikit-learn ships it.

    Raises:
      ValueError: scikit-learn is missing, images of another size are wanted, or other labels.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "config.data.source = 'digits': the package scikit-learn is not installed; "
            "run pip install -e '.[images]'"
        ) from None
    shape = parts.image
    assert shape is not None
    if (shape.image_size, shape.channels) != (DIGITS_SIZE, 1):
        raise ValueError(
            f"config.vision.image_size = {shape.image_size}, config.vision.channels = "
            f"{shape.channels}: config.data.source = 'digits' has {DIGITS_SIZE} x {DIGITS_SIZE} "
            f"pixels of one channel; set them to {DIGITS_SIZE} and 1"
        )
    digits = load_digits()
    for number, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        labels = {"digit": int(digit), "parity": int(digit) % 2}
        yield Document(
            score(f"digit {number}"),
            f"a scan of the digit {WORDS[digit]}" if parts.text else "",
            labels=tuple(labels[task] for task in parts.tasks),
            image=image.astype(np.uint8)[:, :, None],
        )


def image_documents(
    config: DataConfig, shown: str, file: Path, name: str, parts: Parts
) -> Iterator[Document]:
    """The images that a jsonl names, with their captions and labels where those are wanted.

    Raises:
      ValueError: a line or an image that cannot be read; Pillow is missing.
    """
    assert parts.image is not None
    for number, row, where in json_rows(shown, file):
        path = file.parent / text_of(row, where, IMAGE_FIELD)
        key = "config.data.text_field"
        yield Document(
            score(f"{name}:{number}"),
            text_of(row, where, config.text_field, key) if parts.text else "",
            labels=labels_of(row, where, parts.tasks),
            image=read_image(path, where, parts.image),
        )


def image_files(shown: str, file: Path) -> list[Path]:
    """The images that a jsonl names."""
    return [
        file.parent / text_of(row, where, IMAGE_FIELD) for _, row, where in json_rows(shown, file)
    ]


def read_image(path: Path, where: str, shape: ImageShape) -> np.ndarray:
    """An image file made square, uint8 [size, size, channels].

    Raises:
      ValueError: no such file, or no image in it; Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError:
        raise ValueError(
            "config.data.source = 'images': the package pillow is not installed; "
            "run pip install -e '.[images]'"
        ) from None
    size = (shape.image_size, shape.image_size)
    try:
        with Image.open(path) as image:
            kind = image.convert("L" if shape.channels == 1 else "RGB")
            pixels = np.asarray(kind.resize(size, Image.Resampling.BILINEAR))
    except FileNotFoundError:
        raise ValueError(
            f"{where}: no such image '{path}'; a path is relative to the file that names it"
        ) from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{where}: '{path}' is no whole image ({reason})") from None
    return pixels.reshape(*size, shape.channels)
