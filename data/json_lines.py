"""Files with one JSON object a line: their rows, the texts and the labels in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path


def json_rows(shown: str, file: Path) -> Iterator[tuple[int, object, str]]:
    """(line number, row, where it is) of every line of a file that is not blank."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{shown}: {file}:{number}"
            text = decode(line, where)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                reason = f"column {error.colno}: {error.msg.removesuffix(' at')}"
                raise ValueError(f"{where}: not JSON ({reason}); give one object a line") from None
            yield number, row, where


def text_of(row: object, where: str, field: str, key: str = "") -> str:
    """The text in a field; `key` is the config key that names the field, if one does."""
    row = _object(row, where)
    shown = f"{key} = '{field}'" if key else f"'{field}'"
    if field not in row:
        raise ValueError(
            f"{where}: no field {shown} in it, only {', '.join(map(str, row)) or 'nothing'}; "
            f"{'name the field that holds the text' if key else 'every line needs it'}"
        )
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: field {shown} holds {type(text).__name__}, not text; "
            f"{'name a field that holds text' if key else 'give a text'}"
        )
    return text


def labels_of(row: object, where: str, tasks: Mapping[str, int]) -> tuple[int, ...]:
    """The class of each task, from the field of the task's name."""
    labels = []
    for task, classes in tasks.items():
        label = _object(row, where).get(task)
        if type(label) is not int or not 0 <= label < classes:
            raise ValueError(
                f"{where}: field {task!r} holds {label!r}; config.objective.tasks.{task} = "
                f"{classes} wants a whole number from 0 to {classes - 1}"
            )
        labels.append(label)
    return tuple(labels)


def _object(row: object, where: str) -> dict[str, object]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {type(row).__name__}, not an object; give one object a line")
    return row


def decode(content: bytes, where: str) -> str:
    """UTF-8 text, or an error that names the place."""
    if b"\0" in content:
        raise ValueError(f"{where} is binary (it has NUL bytes); give UTF-8 text")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 (byte {error.start}); give UTF-8 text") from None
