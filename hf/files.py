"""A checkpoint folder of Hugging Face: config.json and safetensors, in one file or in shards.

Tensors are listed from the headers alone and read one slice at a time through a memory map that is
given up after each, so that reading leaves nothing behind. Nothing unpickles, and no code of a
folder is run.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
OTHER_KINDS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf")


@dataclass(frozen=True)
class Stored:
    """Where one tensor is: nothing of it has been read.

    Attributes:
      kind: its dtype as the file names it, such as `BF16`.
      start: offset of its first byte in the file.
    """

    file: Path
    kind: str
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.kind]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def map(self) -> np.ndarray:
        """The tensor as an array whose bytes are read where it is looked at.

        Pages that were read count as this process's memory until the array is gone.
        """
        if not math.prod(self.shape):
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.start, self.shape)


@dataclass(frozen=True)
class CheckpointFolder:
    """What is in a folder.

    Attributes:
      path: the folder.
      key: what named it, for messages: `config.init_from`, `--hf`.
      config: its config.json.
      tensors: name -> where.
    """

    path: Path
    key: str
    config: dict[str, Any]
    tensors: dict[str, Stored]


def read_config_json(path: Path, key: str) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
      ValueError: no such folder, no config.json in it, or one that is no JSON object.
    """
    if not path.is_dir():
        raise ValueError(
            f"{key} = '{path}': no such folder; give a local one with {CONFIG} and {WEIGHTS}"
        )
    if not (path / CONFIG).is_file():
        raise ValueError(f"{key} = '{path}': no {CONFIG} in it; give a whole checkpoint folder")
    return _json_object(path / CONFIG, key)


def open_folder(path: Path, key: str) -> CheckpointFolder:
    """Lists a checkpoint folder; reads headers alone.

    Raises:
      ValueError: what `read_config_json` refuses; weights that are missing or of another kind than
        safetensors; a file that is truncated or corrupt; an index that names what is not there.
    """
    config = read_config_json(path, key)
    if (path / INDEX).is_file():
        return CheckpointFolder(path, key, config, _sharded(path, key))
    if (path / WEIGHTS).is_file():
        return CheckpointFolder(path, key, config, _header(path / WEIGHTS, key))
    others = sorted(file.name for kind in OTHER_KINDS for file in path.glob(kind))
    found = f"there is {others[0]}, which is not read; " if others else ""
    raise ValueError(
        f"{key} = '{path}': no {WEIGHTS} and no {INDEX} in it; {found}save the model as safetensors"
    )


def _sharded(path: Path, key: str) -> dict[str, Stored]:
    where = _json_object(path / INDEX, key).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{key} = '{path}': {INDEX} has no weight_map; download it again")
    tensors: dict[str, Stored] = {}
    for name in sorted(set(map(str, where.values()))):
        # A file of the folder itself: an index may not point elsewhere.
        if Path(name).name != name or not (path / name).is_file():
            raise ValueError(
                f"{key} = '{path}': {INDEX} names '{name}', which is not there; download it again"
            )
        for tensor, stored in _header(path / name, key).items():
            if where.get(tensor) == name:
                tensors[tensor] = stored
    missing = sorted(set(where) - set(tensors))
    if missing:
        raise ValueError(
            f"{key} = '{path}': {INDEX} says that '{missing[0]}' is in '{where[missing[0]]}', and "
            f"it is not ({len(missing)} such tensors); download both again"
        )
    return tensors


def _header(file: Path, key: str) -> dict[str, Stored]:
    """The tensors of one file (https://github.com/huggingface/safetensors#format)."""
    try:
        with safe_open(file, framework="numpy"):  # checks header, offsets and length
            pass
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{key} = '{file}': truncated or corrupt ({error}); download it again"
        ) from error
    header.pop("__metadata__", None)
    data = 8 + length
    return {
        name: Stored(
            file, tensor["dtype"], tuple(tensor["shape"]), data + tensor["data_offsets"][0]
        )
        for name, tensor in header.items()
    }


def _json_object(file: Path, key: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{key} = '{file}': not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{key} = '{file}': should be a JSON object; download it again")
    return content
