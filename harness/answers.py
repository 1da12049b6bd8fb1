"""Answers that are kept as they come, so that the same command again asks only for the rest.

Process 0 alone reads and writes the file; the others hear from it what is known, since all of them
must run the same batches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from data.tokens import Tokenizer


class Answers:
    """Answers by key, in a file of JSON lines.

    Args:
      path: the file, made where there is none; None keeps nothing beyond this process.

    Raises:
      OSError: it cannot be read or written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._known: dict[str, Any] = {}
        self._file = None
        if path is None or jax.process_index() != 0:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._file.seek(0)
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                self._file.truncate(end)  # torn: the process was killed while writing it
                break
            end += len(line)
            one = json.loads(line)
            self._known[one["key"]] = one["answer"]

    def find(self, keys: Sequence[str]) -> dict[str, Any]:
        """What is known of these keys, the same in every process."""
        return _from_first({key: self._known[key] for key in keys if key in self._known})

    def keep(self, found: Mapping[str, Any]) -> None:
        """Adds answers; they are on disk when this returns."""
        self._known |= found
        if self._file is not None:
            lines = [json.dumps({"key": key, "answer": one}) + "\n" for key, one in found.items()]
            self._file.write("".join(lines).encode())
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def answers_path(
    workdir: Path, step: int | None, source: Path, computed: object, tokenizer: Tokenizer
) -> Path:
    """The file of answers of one checkpoint: another one, or another tokenizer, has another.

    Args:
      workdir: in whose folder `tasks` it is.
      step: of the checkpoint; None for a folder of Hugging Face.
      source: the folder of the checkpoint, whose files are told apart by size and time.
      computed: what is computed from it, by its `repr`.
      tokenizer: of the texts.
    """
    files = sorted(path for path in source.rglob("*") if path.is_file())
    stats = [(str(file.relative_to(source)), file.stat()) for file in files]
    listed = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    ids = tokenizer.fingerprint, tokenizer.end_id, tokenizer.start_id
    digest = hashlib.blake2b(repr((listed, computed, ids)).encode(), digest_size=8).hexdigest()
    return workdir / "tasks" / f"{'hf' if step is None else f'step_{step}'}_{digest}.jsonl"


def _from_first(value: dict[str, Any]) -> dict[str, Any]:
    """The value that process 0 has."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    mine = text if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(mine)).tobytes())
