"""CPython's own standard library: its files, as texts, and the packages that they are of."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data.documents import Document, score

STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# sha256 over the names and sizes of the files, of CPython as python.org releases it.
STDLIB_PINNED = {
    "3.11.7": "c4ec4683e40ab4024adf94e9fb6662c31984bf0fd8fccd76a30e26f6fb5ba024",
    "3.12.1": "0b25cb98b6287f51a4acc4585b815eb73f751881c43040f2aaddd9998ca77d13",
    "3.13.0": "56672c3a1882475ac3ddf5396fb766f9c2dda751b4b2357f294fa3ddaecf1eb3",
}

PACKAGE = "package"  # the task: which package a file is of

log = logging.getLogger(__name__)


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


def stdlib_texts() -> Iterator[tuple[str, str]]:
    """(name, text) of the files, a handful left out that are not UTF-8 or empty."""
    root, files, _ = stdlib_files()
    for file in files:
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError:  # in other encodings, as their first line says
            continue
        if text:
            yield file.relative_to(root).as_posix(), text


def stdlib_documents(packages: int = 0) -> Iterator[Document]:
    """The files, a document each.

    Args:
      packages: keeps only files of that many packages, the largest by their files' bytes; the label
        is which, from 0 for the largest. 0: all files, without labels.

    Raises:
      ValueError: there are fewer packages.
    """
    names = largest_packages(packages) if packages else []
    for name, text in stdlib_texts():
        if not packages:
            yield Document(score(name), text)
        elif package_of(name) in names:
            yield Document(score(name), text, labels=(names.index(package_of(name)),))


def largest_packages(count: int) -> list[str]:
    """The names of the `count` largest top-level packages, the largest first."""
    root, files, _ = stdlib_files()
    sizes: Counter[str] = Counter()
    for file in files:
        package = package_of(file.relative_to(root).as_posix())
        if package:
            sizes[package] += file.stat().st_size
    if count > len(sizes):
        raise ValueError(
            f"config.objective.tasks.package = {count}: the standard library has {len(sizes)} "
            f"packages; give at most as many"
        )
    return sorted(sizes, key=lambda name: (-sizes[name], name))[:count]


def package_of(name: str) -> str:
    """The top-level package of a file, empty for a module by itself."""
    return name.partition("/")[0] if "/" in name else ""
