"""Where documents come from: the sources of `config.data.source`."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.config import NO_PATH, DataConfig
from data.docstrings import docstring_documents
from data.documents import HELD, HELD_SHARE, TRAINED, Document, Documents, held_out, score, texts_of
from data.images import digit_documents, image_documents
from data.json_lines import decode, json_rows, labels_of, text_of
from data.parts import TEXT, Parts
from data.stdlib import PACKAGE, stdlib_documents

TEXT_FIELD = "config.data.text_field"


def find_files(config: DataConfig, key: str = "path") -> list[Path]:
    """The files that `config.data.<key>` names, sorted.

    Raises:
      ValueError: nothing there, an empty file, or a folder where a file is wanted.
    """
    if config.source in NO_PATH:
        return []
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


def open_documents(config: DataConfig, parts: Parts = TEXT) -> Documents:
    """A function that goes through all documents of a source, in a fixed order.

    Raises (some only when the documents are read):
      ValueError: a file that is missing, empty, not UTF-8 text or malformed, naming key and place.
    """
    if config.eval_path:
        train, held = (_documents(config, key, parts) for key in ("path", "eval_path"))
        return lambda: itertools.chain(
            (document._replace(score=TRAINED) for document in train()),
            (document._replace(score=HELD) for document in held()),
        )
    documents = _documents(config, "path", parts)
    return lambda: _cut_a_lone_document(documents())


def training_texts(documents: Documents) -> Iterator[str]:
    """The texts that are not held out, and what they are made from."""
    held = held_out(np.fromiter((document.score for document in documents()), np.uint64))
    return itertools.chain.from_iterable(
        texts_of(document) for document, out in zip(documents(), held, strict=True) if not out
    )


def _documents(config: DataConfig, key: str, parts: Parts) -> Documents:
    if config.source == "stdlib":
        return lambda: stdlib_documents(parts.tasks.get(PACKAGE, 0))
    if config.source == "docstrings":
        return lambda: iter(docstring_documents())
    if config.source == "digits":
        return lambda: digit_documents(parts)
    files = find_files(config, key)
    if config.source == "dataset":
        return lambda: _dataset(config, key, files)
    root = Path(os.path.commonpath([file.parent for file in files]))
    shown = f"config.data.{key} = '{getattr(config, key)}'"
    read = {"text": _text, "jsonl": _json_lines, "images": image_documents}[config.source]
    return lambda: itertools.chain.from_iterable(
        read(config, shown, file, file.relative_to(root).as_posix(), parts) for file in files
    )


def _cut_a_lone_document(documents: Iterator[Document]) -> Iterator[Document]:
    """One text alone is cut in two, or there would be nothing to hold out (or to train on)."""
    first = next(documents, None)
    if first is None:
        return
    second = next(documents, None)
    if second is not None or first.source is not None or first.image is not None:
        documents = itertools.chain([] if second is None else [second], documents)
        yield from itertools.chain([first], documents)
        return
    text = first.text
    middle = int(len(text) * (1 - HELD_SHARE))
    middle = text.rfind("\n", 0, middle) + 1 or middle  # at the end of a line, if it has lines
    yield first._replace(score=TRAINED, text=text[:middle])
    yield first._replace(score=HELD, text=text[middle:])


def _text(
    config: DataConfig, shown: str, file: Path, name: str, parts: Parts
) -> Iterator[Document]:
    content = file.read_bytes()
    yield Document(score(name), decode(content, f"{shown}: '{file}'"))


def _json_lines(
    config: DataConfig, shown: str, file: Path, name: str, parts: Parts
) -> Iterator[Document]:
    for number, row, where in json_rows(shown, file):
        source = None
        if parts.source:
            source = text_of(row, where, config.source_field, "config.data.source_field")
        yield Document(
            score(f"{name}:{number}"),
            text_of(row, where, config.text_field, TEXT_FIELD),
            source=source,
            labels=labels_of(row, where, parts.tasks),
        )


def _dataset(config: DataConfig, key: str, files: list[Path]) -> Iterator[Document]:
    shown = f"config.data.{key} = '{getattr(config, key)}'"
    for number, row in enumerate(_dataset_rows(shown, files)):
        text = text_of(row, f"{shown}: row {number}", config.text_field, TEXT_FIELD)
        yield Document(score(str(number)), text)


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
