"""Keys of a config that were set and are not read, said in a sentence each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any


def idle_keys(config: Any, section: str, keys: Iterable[str], why: str) -> list[str]:
    """`config.SECTION.KEY has no effect: WHY` for each key that is not as it is by itself.

    Args:
      config: a dataclass of the section.
    """
    before = {field.name: field.default for field in fields(config)}
    given = [key for key in keys if getattr(config, key) != before[key]]
    return [f"config.{section}.{key} has no effect: {why}" for key in given]
