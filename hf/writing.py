"""Writes safetensors one tensor at a time: the library's own writer wants a whole file in memory.

Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf.files import DTYPES, INDEX, WEIGHTS

KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Written:
    """A tensor that is to be written.

    Attributes:
      value: makes it, when its turn comes; in any float dtype and any memory order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    value: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(folder: Path, tensors: Mapping[str, Written], shard_bytes: int) -> None:
    """Fills a folder with the files of a model, and their index where there are several.

    A file is at most `shard_bytes` long without its header, or holds one larger tensor.
    """
    files: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if files[-1] and size + tensor.nbytes > shard_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += tensor.nbytes
    if len(files) == 1:
        _write_file(folder / WEIGHTS, tensors)
        return
    where: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        _write_file(folder / file, {name: tensors[name] for name in names})
        where |= dict.fromkeys(names, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(file: Path, tensors: Mapping[str, Written]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": KINDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            array = np.ascontiguousarray(tensor.value(), dtype=tensor.dtype)
            assert array.shape == tensor.shape, (name, array.shape, tensor.shape)
            opened.write(array.view(np.uint8).data)
        opened.flush()
        os.fsync(opened.fileno())
