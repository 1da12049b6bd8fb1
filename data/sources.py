"""Documents: where text comes from, and which of it is held out."""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import json
import logging
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data.config import DataConfig

# A document is its text and a score: a hash of its identity, uniform over uint64, that decides
# whether it is held out. The extremes are reserved for documents whose side is already settled.
Document = tuple[int, str]
Documents = Callable[[], Iterator[Document]]
HELD, TRAINED = 0, 2**64 - 1
HELD_SHARE = 0.05

STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# sha256 over the names and sizes of the files, of CPython as python.org releases it.
STDLIB_PINNED = {
    "3.11.7": "c4ec4683e40ab4024adf94e9fb6662c31984bf0fd8fccd76a30e26f6fb5ba024",
    "3.12.1": "0b25cb98b6287f51a4acc4585b815eb73f751881c43040f2aaddd9998ca77d13",
    "3.13.0": "56672c3a1882475ac3ddf5396fb766f9c2dda751b4b2357f294fa3ddaecf1eb3",
}

log = logging.getLogger(__name__)


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


@functools.cache  # so that it warns once
def stdlib_files() -> tuple[Path, list[Path], str]:
    """The folder, the .py files and the sha256 of names and sizes of this CPython's library.

    Tests are left out (they are half of it and say little), and what differs from machine to
    machine: installed packages and the build's own settings. A list that differs from the one
    pinned for this version is reported once through `logging`.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - STDLIB_SKIPPED)
        local = ("_sysconfigdata", "sitecustomize", "usercustomize")
        files += [
            Path(folder, name)
            for name in names
            if name.endswith(".py") and not name.startswith(local)
        ]
    files.sort(key=lambda file: file.relative_to(root).as_posix())
    if not files:
        raise ValueError(
            f"config.data.source = 'stdlib': '{root}' holds no .py files; use a CPython that has "
            "its library's source, or config.data.source = 'text' with config.data.path"
        )
    listing = "".join(
        f"{file.relative_to(root).as_posix()} {file.stat().st_size}\n" for file in files
    )
    digest = hashlib.sha256(listing.encode()).hexdigest()
    version = platform.python_version()
    if STDLIB_PINNED.get(version) != digest:
        log.warning(
            "the standard library of Python %s (%d files, sha256 %s) is not one of those pinned "
            "(%s): runs on it compare only with runs on the same",
            version, len(files), digest[:12], ", ".join(STDLIB_PINNED),
        )  # fmt: skip
    return root, files, digest


def find_files(config: DataConfig, key: str = "path") -> list[Path]:
    """The files that `config.data.<key>` names, sorted.

    Raises:
      ValueError: nothing there, an empty file, or a folder where a file is wanted.
    """
    if config.source == "stdlib":
        return stdlib_files()[1]
    value = getattr(config, key)
    shown = f"config.data.{key} = '{value}'"
    path = Path(os.path.expanduser(value))
    if config.source == "dataset":
        if not path.is_dir():
            raise ValueError(f"{shown}: no such folder; give a folder of .parquet or .arrow files")
        files = sorted(f for ending in ("parquet", "arrow") for f in path.rglob(f"*.{ending}"))
        if not files:
            raise ValueError(
                f"{shown}: no .parquet or .arrow file in it; give a folder that has some"
            )
        if len({file.suffix for file in files}) > 1:
            raise ValueError(f"{shown}: both .parquet and .arrow files in it; give a folder of one")
    elif glob.has_magic(str(path)) and not path.exists():
        found = glob.glob(str(path), recursive=True)
        files = sorted(f for f in map(Path, found) if f.is_file())
        if not files:
            raise ValueError(f"{shown}: no file matches; give a glob such as 'texts/**/*.txt'")
    elif path.is_dir():
        raise ValueError(f"{shown}: a folder; give a file or a glob such as '{value}/**/*.*'")
    elif not path.exists():
        raise ValueError(f"{shown}: no such file; give the path of a file or a glob")
    else:
        files = [path]
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"{shown}: '{file}' is empty; remove it or give another file")
        if not os.access(file, os.R_OK):
            raise ValueError(f"{shown}: '{file}' may not be read; change its permissions")
    return files


def open_documents(config: DataConfig) -> Documents:
    """A function that goes through all documents of a text source, in a fixed order.

    Raises (some only when the documents are read):
      ValueError: a file that is missing, empty, not UTF-8 text or malformed, naming key and place.
    """
    if config.eval_path:
        train, held = _documents(config, "path"), _documents(config, "eval_path")
        return lambda: itertools.chain(
            ((TRAINED, text) for _, text in train()), ((HELD, text) for _, text in held())
        )
    documents = _documents(config, "path")
    return lambda: _cut_a_lone_document(documents())


def training_texts(documents: Documents) -> Iterator[str]:
    """The texts that are not held out."""
    held = held_out(np.fromiter((score for score, _ in documents()), np.uint64))
    return (text for (_, text), out in zip(documents(), held, strict=True) if not out)


def _documents(config: DataConfig, key: str) -> Documents:
    files = find_files(config, key)
    if config.source == "stdlib":
        root = stdlib_files()[0]
        return lambda: _stdlib(root, files)
    if config.source == "dataset":
        return lambda: _dataset(config, key, files)
    root = Path(os.path.commonpath([file.parent for file in files]))
    shown = f"config.data.{key} = '{getattr(config, key)}'"
    read = _text if config.source == "text" else _json_lines
    return lambda: itertools.chain.from_iterable(
        read(config, shown, file, file.relative_to(root).as_posix()) for file in files
    )


def _cut_a_lone_document(documents: Iterator[Document]) -> Iterator[Document]:
    """One document alone is cut in two, or there would be nothing to hold out (or to train on)."""
    first = next(documents, None)
    if first is None:
        return
    second = next(documents, None)
    if second is not None:
        yield from itertools.chain([first, second], documents)
        return
    text = first[1]
    middle = int(len(text) * (1 - HELD_SHARE))
    middle = text.rfind("\n", 0, middle) + 1 or middle  # at the end of a line, if it has lines
    yield TRAINED, text[:middle]
    yield HELD, text[middle:]


def _stdlib(root: Path, files: list[Path]) -> Iterator[Document]:
    for file in files:
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError:  # a handful in other encodings, as their first line says
            continue
        if text:
            yield score(file.relative_to(root).as_posix()), text


def _text(config: DataConfig, shown: str, file: Path, name: str) -> Iterator[Document]:
    content = file.read_bytes()
    yield score(name), _decode(content, f"{shown}: '{file}'")


def _json_lines(config: DataConfig, shown: str, file: Path, name: str) -> Iterator[Document]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{shown}: {file}:{number}"
            text = _decode(line, where)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                reason = f"column {error.colno}: {error.msg.removesuffix(' at')}"
                raise ValueError(f"{where}: not JSON ({reason}); give one object a line") from None
            yield score(f"{name}:{number}"), _field(config, row, where)


def _dataset(config: DataConfig, key: str, files: list[Path]) -> Iterator[Document]:
    shown = f"config.data.{key} = '{getattr(config, key)}'"
    for number, row in enumerate(_dataset_rows(shown, files)):
        yield score(str(number)), _field(config, row, f"{shown}: row {number}")


def _dataset_rows(shown: str, files: list[Path]) -> Iterator[object]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            "config.data.source = 'dataset': the package datasets is not installed; "
            "run pip install -e '.[hf]'"
        ) from None
    kind = files[0].suffix[1:]
    names = [str(file) for file in files]
    try:  # streamed: nothing is copied to the library's own cache
        yield from datasets.load_dataset(kind, data_files=names, split="train", streaming=True)
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{shown}: not readable as {kind} ({reason}); give whole files") from error


def _field(config: DataConfig, row: object, where: str) -> str:
    field = config.text_field
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {type(row).__name__}, not an object; give one object a line")
    if field not in row:
        raise ValueError(
            f"{where}: no field config.data.text_field = '{field}' in it, only "
            f"{', '.join(map(str, row)) or 'nothing'}; name the field that holds the text"
        )
    if not isinstance(row[field], str):
        raise ValueError(
            f"{where}: field config.data.text_field = '{field}' holds "
            f"{type(row[field]).__name__}, not text; name a field that holds text"
        )
    return row[field]


def _decode(content: bytes, where: str) -> str:
    if b"\0" in content:
        raise ValueError(f"{where} is binary (it has NUL bytes); give UTF-8 text")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 (byte {error.start}); give UTF-8 text") from None
