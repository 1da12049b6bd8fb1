"""What a complete step holds: each tensor's shape and dtype, each file's size and checksum.

Orbax notices some damage, and only when it reads the place. So the last file written into a step
lists all others, and a step is good only while they match.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

NAME = "manifest.json"
_BLOCK = 1 << 22  # bytes read at a time: flat memory, and zlib frees the interpreter lock meanwhile
_THREADS = 4


def write(directory: Path, tensors: dict[str, dict[str, Any]]) -> None:
    """Writes the manifest of all files under `directory`.

    Args:
      directory: a step that is otherwise complete.
      tensors: name -> {"shape", "dtype", and "key" (the generator) of typed random keys}.
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_THREADS) as pool:
        checksums = list(pool.map(_crc32, files))
    listed = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "crc32": checksum}
        for path, checksum in zip(files, checksums, strict=True)
    }
    text = json.dumps({"tensors": tensors, "files": listed}, indent=1)
    (directory / NAME).write_text(text, encoding="utf-8")


def tensors(directory: Path) -> dict[str, dict[str, Any]]:
    """The tensors of a step that `damage` found nothing wrong with."""
    return json.loads((directory / NAME).read_text(encoding="utf-8"))["tensors"]


def fingerprint(directory: Path) -> str:
    """Of the arrays' files, as their checksums say; not of the metadata beside them."""
    files = json.loads((directory / NAME).read_text(encoding="utf-8"))["files"]
    arrays = {name: [f["bytes"], f["crc32"]] for name, f in files.items() if "/" in name}
    return hashlib.sha256(json.dumps(arrays, sort_keys=True).encode()).hexdigest()


def damage(directory: Path) -> str | None:
    """What is wrong with the step in `directory`, naming the file; None if nothing is.

    Sizes are compared before anything is read, so that the common damage is found at once.
    """
    try:
        files = json.loads((directory / NAME).read_text(encoding="utf-8"))["files"]
    except OSError as error:
        return f"{NAME}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{NAME}: not the JSON that was written"
    for name, wanted in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name}: missing"
        size = path.stat().st_size
        if size != wanted["bytes"]:
            return f"{name}: {size} bytes instead of {wanted['bytes']}"
    with ThreadPoolExecutor(_THREADS) as pool:
        checksums = pool.map(_crc32, [directory / name for name in files])
        for (name, wanted), checksum in zip(files.items(), checksums, strict=True):
            if checksum != wanted["crc32"]:
                return f"{name}: its checksum is not the one that was written"
    return None


def _crc32(path: Path) -> int:
    """The CRC-32 of a file; -1 if it cannot be read."""
    checksum = 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                checksum = zlib.crc32(block, checksum)
    except OSError:
        return -1
    return checksum
