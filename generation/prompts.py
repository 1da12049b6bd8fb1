"""Prompts from flags, from a file or from standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

LONGEST = 40  # characters of a prompt in a message
FIELDS = ("prompt", "tokens", "image")
ADAPTER = "adapter"  # another field


@dataclass(frozen=True)
class Prompt:
    """What a text is to follow.

    Attributes:
      where: names it in messages.
      text: of the prompt.
      tokens: instead of the text; None: those of the text.
      image: the file of an image, beside either.
      adapter: the workdir of adapters that its text is by; None: of none.
    """

    where: str
    text: str = ""
    tokens: tuple[int, ...] | None = None
    image: Path | None = None
    adapter: Path | None = None


def read_prompts(
    texts: Sequence[str], file: Path | None, images: Sequence[Path] = ()
) -> list[Prompt]:
    """All prompts, in order.

    Args:
      texts: of `--prompt`.
      file: of `--prompts`: a prompt a line, or of a `.jsonl` an object a line with `prompt` or
        `tokens`, and `image`; `-` is standard input, a prompt a line.
      images: of `--image`, one for each text, or without texts one for each prompt.

    Raises:
      ValueError: none at all, or a file or a line that cannot be read.
    """
    if images and file is not None:
        raise ValueError(f"--image={images[0]}: --prompts names its images itself, in a .jsonl")
    if images and texts and len(images) != len(texts):
        raise ValueError(
            f"--image: {len(images)} images for {len(texts)} prompts; give one for each --prompt, "
            f"in order"
        )
    own = list(texts) or [""] * len(images)
    found = [
        Prompt(f"--prompt={_short(text)!r}" if texts else f"--image={image}", text, image=image)
        for text, image in zip_longest(own, images)
    ]
    if file is not None:
        found += _read(file)
    if not found:
        raise ValueError(
            "--prompt: missing; give --prompt=TEXT, or --prompts=FILE with one a line (- is "
            "standard input)"
        )
    return found


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _read(file: Path) -> list[Prompt]:
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"--prompts={file}: no such file; one prompt a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts={file}: cannot be read as UTF-8 text ({error})") from None
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"--prompts={file}: empty; give one prompt a line")
    if file.suffix != ".jsonl":
        return [Prompt(f"--prompts={file}, line {n}", line) for n, line in lines]
    return [_of_json(f"--prompts={file}, line {n}", line, file.parent) for n, line in lines]


def _of_json(where: str, line: str, folder: Path) -> Prompt:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict) or not {"prompt", "tokens", "image"} & set(row):
        raise ValueError(f"{where}: give an object with {', '.join(FIELDS[:-1])} or {FIELDS[-1]}")
    text, tokens, image, adapter = (row.get(name) for name in (*FIELDS, ADAPTER))
    if not all(isinstance(value or "", str) for value in (text, image, adapter)):
        raise ValueError(f"{where}: prompt, image and adapter are strings")
    whole = isinstance(tokens, list) and all(type(token) is int for token in tokens)
    if tokens is not None and not whole:
        raise ValueError(f"{where}: tokens = {tokens!r}: a list of whole numbers")
    return Prompt(
        where,
        text or "",
        None if tokens is None else tuple(tokens),
        folder / image if image else None,
        folder / adapter if adapter else None,
    )


def with_adapters(prompts: Sequence[Prompt], adapters: Sequence[Path]) -> list[Prompt]:
    """Prompts with the adapters of `--adapter`: one for each, in order, or one for all.

    Raises:
      ValueError: another number of them, or a prompt that names its own.
    """
    if not adapters:
        return list(prompts)
    for prompt in prompts:
        if prompt.adapter is not None:
            raise ValueError(
                f"--adapter: {prompt.where} names {prompt.adapter}; leave one of them out"
            )
    if len(adapters) not in (1, len(prompts)):
        raise ValueError(
            f"--adapter: {len(adapters)} for {len(prompts)} prompts; give one for each, in order, "
            f"or one for all"
        )
    each = adapters if len(adapters) > 1 else [*adapters] * len(prompts)
    return [replace(prompt, adapter=a) for prompt, a in zip(prompts, each, strict=True)]
